"""A vlmoe checkpoint in, the same with experts of another form, or routed otherwise, out: `vlmoe densify`, `vlmoe
compress`, `vlmoe convert-routing`, top to bottom.

>>> densify(DensifyArguments(checkpoint="my-delta", output_dir="my-full"))
PosixPath('my-full')
>>> compress(CompressArguments(checkpoint="my-full", rank=16, output_dir="my-delta"))
PosixPath('my-delta')
>>> convert_routing(ConvertRoutingArguments(checkpoint="my-full", to="isolated", output_dir="my-pools"))
PosixPath('my-pools')
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import ADAPTER_CONFIG_NAME

from modeling_vlmoe import __version__, register
from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.model_cards import write_card
from modeling_vlmoe.weight_fingerprint import fingerprint

from .delta_arguments import REWRITE_RECEIPT_NAME, CompressArguments, DensifyArguments
from .export import open_checkpoint, opened
from .gaps import Findings
from .meta_models import build_vlm
from .output_folder import check_output_folder, check_parents_survive, check_space, whole_or_nothing
from .parents import Parent, find_folder
from .probes import GIVEN
from .receipt import PACKAGES, describe_mapping, describe_proof
from .rewrite_plan import RewritePlan, plan_rewrite
from .rewrite_proof import check_routing, measure_compressed, prove_densified
from .routing_arguments import ConvertRoutingArguments
from .routing_plan import KIND as ROUTING
from .routing_plan import plan_routing
from .streaming import write_checkpoint
from .summaries import format_bytes, summarise

logger = logging.getLogger(__name__)

FORMAT = 1
CHECKS = {"densify": prove_densified, "compress": measure_compressed, ROUTING: check_routing}


def densify(args: DensifyArguments) -> Path:
    """Writes a checkpoint's delta experts as whole ones, `base + b a`, proved on the written files.

    Args:
        args: What to write of what.

    Returns:
        The output folder.

    Raises:
        ValueError: for whatever the user can mend.
        ProofError: a ValueError, when the result does not compute what the checkpoint computes.
        OSError: when the disk is full.
    """
    return _rewrite("densify", args)


def compress(args: CompressArguments) -> Path:
    """Writes a checkpoint's whole experts as delta experts: their mean as the base (their common weights where they
    are copies), and of the rest the best pairs of a rank (DeRS, 2503.01359). The error is measured and written down.

    Args:
        args: What to write of what.

    Returns:
        The output folder.

    Raises:
        ValueError: for whatever the user can mend.
        ProofError: a ValueError, when the files do not hold what they were to hold.
        OSError: when the disk is full.
    """
    return _rewrite("compress", args)


def convert_routing(args: ConvertRoutingArguments) -> Path:
    """Writes a checkpoint whose LLM is routed otherwise by modality: `modality_routing` and `modality_experts` of its
    configuration are changed, and routers are carried over (see routing_plan.py).

    Where experts are copies of one another, or every token keeps its experts and its router, the result computes what
    the checkpoint computes, which is proved; else the gap is measured, on a picture and text, and written down.

    Args:
        args: What to write of what.

    Returns:
        The output folder.

    Raises:
        ValueError: for whatever the user can mend.
        ProofError: a ValueError, when the result does not compute what the checkpoint computes, though it should.
        OSError: when the disk is full.
    """
    return _rewrite(ROUTING, args)


def preview_rewrite(kind: str, args: Any) -> str:
    """What would be written, for people; nothing is written, and no output folder need be named.

    Args:
        kind: "densify", "compress" or "convert-routing".
        args: Its arguments.

    Raises:
        ValueError: as the function of that name would.
    """
    register()
    with _opened(kind, args) as source:
        plan = _plan(kind, args, source)
        lines = [] if plan.routing is None else describe_routing(plan.routing.describe())
        return "\n".join([summarise(plan.mapping), *lines])


def _plan(kind: str, args: Any, source: Parent) -> RewritePlan:
    return plan_routing(args, source) if kind == ROUTING else plan_rewrite(kind, args, source)


@contextmanager
def _opened(kind: str, args: Any) -> Iterator[Parent]:
    if args.checkpoint is None:
        raise ValueError(f"Name the checkpoint: vlmoe {kind} CHECKPOINT --output-dir OUT.")
    if kind == ROUTING:
        folder = find_folder(args.checkpoint, "vlm", args.revision, flag="checkpoint")
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            raise ValueError(
                f"{args.checkpoint} is an adapter, which fits the routing of the model it was trained on. Merge it "
                "first (modeling_vlmoe.finetune.merge_adapter(adapter, output_dir)), and convert the merged model."
            )
        yield open_checkpoint(args.checkpoint, folder)
        return
    with opened(args) as source:
        yield source


def _rewrite(kind: str, args: Any) -> Path:
    if args.dry_run:
        raise ValueError(f"dry_run is set, but {kind}() writes; preview_rewrite() says what would be written.")
    if args.output_dir is None:
        raise ValueError("Give --output-dir, the folder of the model.")
    register()
    output = Path(args.output_dir).expanduser()
    check_output_folder(output, args.force)
    with _opened(kind, args) as source:
        check_parents_survive(output, [source.folder, *source.reader.files])
        plan = _plan(kind, args, source)
        check_space(output, plan.mapping.num_bytes)
        with whole_or_nothing(output, args.force) as folder:
            hashes = write_checkpoint(folder, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
            _write_companions(plan, folder)
            logger.info("Running the written files beside the checkpoint.")
            findings, errors = CHECKS[kind](plan, folder)
            receipt = build_receipt(plan, findings, errors, hashes, fingerprint(folder))
            text = json.dumps(receipt, indent=2, ensure_ascii=False) + "\n"
            (folder / REWRITE_RECEIPT_NAME).write_text(text, encoding="utf-8")
            write_card(folder, name=output.resolve().name)
    return output


def _write_companions(plan: RewritePlan, folder: Path) -> None:
    """Writes what the checkpoint holds beside its weights: configuration, processor, code, receipt and history."""
    plan.config.save_pretrained(folder)
    plan.generation.save_pretrained(folder)
    plan.write_processor(folder)
    custom_object_save(build_vlm(plan.config), folder)
    for name in (RECEIPT_NAME, HISTORY_NAME):
        if (plan.source.folder / name).is_file():
            shutil.copyfile(plan.source.folder / name, folder / name)


def build_receipt(
    plan: RewritePlan,
    findings: Findings,
    errors: dict[str, dict[str, float]],
    hashes: dict[str, str],
    weights: str | None,
) -> dict[str, Any]:
    """The receipt as JSON values; no path of the machine."""
    checked = describe_proof(findings) if plan.is_exact else {"informative": findings.informative}
    routing = {} if plan.routing is None else {"routing": plan.routing.describe()}
    return {
        "format": FORMAT,
        "kind": plan.kind,
        "source": {"name": Path(plan.source.given).resolve().name, "revision": plan.source.revision},
        "seed": plan.drawing.seed,
        "rank": {
            part: moe.expert_rank
            for part in ("text", "vision", "connector")
            if (moe := plan.config.moe(part)) is not None
        },
        "parameters": {"total": plan.mapping.num_parameters, "active": plan.mapping.num_active_parameters},
        "bytes": {"source": plan.source_bytes, "written": plan.mapping.num_bytes},
        "mapping": describe_mapping(plan.mapping),
        **routing,
        "proof" if plan.is_exact else "gaps": checked,
        "not_proved": plan.not_proved,
        "weight_errors": errors,
        "files_sha256": hashes,
        "weights": weights,
        "versions": {"vlmoe": __version__, **{package: version(package) for package in PACKAGES}},
    }


def describe_routing(routing: dict[str, Any]) -> list[str]:
    """What becomes of the routing, for people; `routing` is that of the receipt."""
    before, after = (
        f"{one['modality_routing']}{f' {pools}' if (pools := one['modality_experts']) else ''}"
        for one in (routing["from"], routing["to"])
    )
    why, is_raw = routing["why_exact"], not routing["norm_topk_prob"]
    raw = (
        "the experts' weights are not renormalised, and routed_scaling_factor was measured for the pools before: give "
        "another one, or tune it"
    )
    return [
        f"routing of the LLM: {before} -> {after}; {routing['routers']}",
        f"computes the same: {why}"
        if why
        else f"another model: {raw if is_raw else 'its experts differ, and tokens get others'}",
    ]


def describe_rewrite(output: Path) -> str:
    """What was written, for people."""
    receipt = json.loads((output / REWRITE_RECEIPT_NAME).read_text(encoding="utf-8"))
    sizes = receipt["bytes"]
    lines = [
        f"{output}: {receipt['parameters']['total']:,} parameters, {format_bytes(sizes['written'])} "
        f"(before: {format_bytes(sizes['source'])})"
    ]
    if "routing" in receipt:
        lines += describe_routing(receipt["routing"])
    if "proof" in receipt:
        proof = receipt["proof"]
        lines.append(
            f"proved equal: largest gap {proof['largest_gap']:.1e} standard deviations "
            f"(limit {proof['largest_gap_limit']:.1e})"
        )
        told = {what: gap for what, gap in proof["informative"].items() if GIVEN not in what}
    else:
        told = receipt["gaps"]["informative"]
        lines += [
            f"{name}: relative error {error['mean']:.2g} (largest of an expert {error['max']:.2g})"
            for name, error in receipt["weight_errors"].items()
        ]
    lines += [f"{what}: {gap:.2g} standard deviations away" for what, gap in told.items()]
    if receipt["not_proved"]:
        lines.append(f"not {'proved' if 'proof' in receipt else 'measured'}: {receipt['not_proved']}")
    return "\n".join([*lines, f"receipt: {REWRITE_RECEIPT_NAME}"])
