"""A vlmoe checkpoint in, a checkpoint of transformers' own classes out: the story, top to bottom.

What is written needs no code of ours: `LlavaForConditionalGeneration` around a sparse LM, or that LM alone, as vLLM,
SGLang, llama.cpp's converter and transformers read them.

>>> export(ExportArguments(checkpoint="my-vlmoe", output_dir="my-llava"))
PosixPath('my-llava')
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME

from modeling_vlmoe import __version__, register
from modeling_vlmoe.companions import RECEIPT_NAME
from modeling_vlmoe.modeling_in_place import is_in_place

from .export_plan import ExportPlan, describe_experts, plan_export
from .export_proof import measure_mean, prove_export
from .gaps import Findings
from .host_export import HostExportPlan, plan_host_export
from .host_export_proof import prove_host_export
from .native_arguments import ExportArguments
from .output_folder import check_output_folder, check_parents_survive, check_space, whole_or_nothing
from .parents import Parent, commit_of, find_folder, read_config
from .probes import GIVEN
from .receipt import PACKAGES, describe_mapping, describe_proof
from .streaming import CheckpointReader, read_json, write_checkpoint
from .summaries import format_bytes, summarise

logger = logging.getLogger(__name__)

EXPORT_RECEIPT_NAME = "export_receipt.json"
FORMAT = 1


def export(args: ExportArguments) -> Path:
    """Writes a vlmoe checkpoint in the form of transformers' own classes.

    It is written into a temporary folder beside the output, proved there against the checkpoint, and moved into place;
    whatever fails leaves nothing behind. An adapter's model is merged with it first, beside the output too.

    Args:
        args: What to write of what.

    Returns:
        The output folder.

    Raises:
        ValueError: for whatever the user can mend, and naming exactly what cannot be written without loss.
        ProofError: a ValueError, when the result does not compute what the checkpoint computes.
        OSError: when the disk is full.
    """
    if args.dry_run:
        raise ValueError("dry_run is set, but export() writes; preview() says what would be written.")
    if args.output_dir is None:
        raise ValueError("Give --output-dir, the folder of the exported model.")
    register()
    output = Path(args.output_dir).expanduser()
    check_output_folder(output, args.force)
    with opened(args) as source:
        check_parents_survive(output, [source.folder, *source.reader.files])
        return write_export(source, args, output)


def write_export(source: Parent, args: ExportArguments, output: Path) -> Path:
    """Plans, writes, proves, and moves into place.

    Raises:
        ValueError, ProofError, OSError: as `export`.
    """
    plan = make_plan(args, source)
    check_space(output, plan.mapping.num_bytes)
    with whole_or_nothing(output, args.force) as folder:
        hashes = write_checkpoint(folder, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
        write_companions(plan, folder)
        logger.info("Running the written files against the checkpoint.")
        prove = prove_host_export if isinstance(plan, HostExportPlan) else prove_export
        write_receipt(plan, prove(plan, folder), hashes, folder)
    return output


def make_plan(args: ExportArguments, source: Parent) -> Any:
    """The plan for our own composite, or for a host's VLM that is sparse in place.

    Raises:
        ValueError: for whatever cannot be written without loss, naming it.
    """
    plan = plan_host_export(args, source) if is_in_place(source.config) else plan_export(args, source)
    refuse_unlike_experts(plan)
    return plan


def preview_export(args: ExportArguments) -> str:
    """What `export` would write, for people; nothing is written, and no output folder need be named.

    Raises:
        ValueError: as `export` would.
    """
    register()
    with opened(args) as source:
        plan = make_plan(args, source)
        return "\n".join(line for line in (plan.summary, summarise(plan.mapping)) if line)


@contextmanager
def opened(args: ExportArguments) -> Iterator[Parent]:
    """The checkpoint that is named; an adapter merged with its model, for as long as it is needed.

    Raises:
        ValueError: when there is none.
    """
    if args.checkpoint is None:
        raise ValueError("Name the checkpoint to export: vlmoe export CHECKPOINT --output-dir OUT.")
    folder = find_folder(args.checkpoint, "vlm", args.revision, flag="checkpoint")
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        yield open_checkpoint(args.checkpoint, folder)
        return
    from modeling_vlmoe.finetune.checkpoints import merge_adapter

    beside = None if args.output_dir is None else Path(args.output_dir).expanduser().resolve().parent
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vlmoe-merged-", dir=beside) as temporary:
        logger.info("%s is an adapter: merging it with its model.", args.checkpoint)
        yield open_checkpoint(args.checkpoint, merge_adapter(folder, Path(temporary) / "model"))


def open_checkpoint(given: str, folder: Path) -> Parent:
    """A vlmoe checkpoint, with its tensors."""
    return Parent("vlm", given, folder, commit_of(folder), read_config(folder), CheckpointReader(folder))


def refuse_unlike_experts(plan: ExportPlan) -> None:
    """Refuses experts in ViT or connector that no dense MLP replaces, unless their mean was asked for and exists.

    Raises:
        ValueError: naming them, why, what can be written instead, and how far that is away; and where a mean is asked
            for that there is no need for.
    """
    if plan.is_exact:
        if plan.args.mean_experts:
            raise ValueError(
                "--mean-experts is given, but nothing that is written needs a mean: the export is exact. Leave it out."
            )
        return
    unlike = {part: form for part, form in plan.forms.items() if form.obstacles}
    has_mean = all(form.has_mean for form in unlike.values())
    if plan.args.mean_experts and has_mean:
        return
    reasons = [
        f"those of {describe_experts(plan.config, part)} {' and '.join(form.obstacles)}"
        for part, form in unlike.items()
    ]
    instead = "There is no mean of theirs that LLaVA could hold (--mean-experts)."
    if has_mean:
        instead = (
            "Or take the mean of each layer's experts (--mean-experts): that is another model, whose image features "
            f"are {measure_mean(plan):.2g} standard deviations away from this one's (measured on a picture of noise)."
        )
    raise ValueError(
        f"LLaVA has no experts in the ViT and the connector, and {'; '.join(reasons)}: they cannot be exported "
        f"without loss. Choose --to text, the LM alone, which is exact. {instead}"
    )


def write_companions(plan: ExportPlan, folder: Path) -> None:
    """Writes what the checkpoint holds beside its weights: configuration, processor or tokenizer, generation
    settings.
    """
    plan.native.save_pretrained(folder)
    plan.generation.save_pretrained(folder)
    for one in plan.companions:
        one.save_pretrained(folder)


def build_receipt(plan: ExportPlan, findings: Findings, hashes: dict[str, str]) -> dict[str, Any]:
    """The receipt as JSON values; no path of the machine."""
    folder = plan.source.folder
    upcycling = read_json(folder / RECEIPT_NAME) if (folder / RECEIPT_NAME).is_file() else {}
    text = plan.native.get_text_config()
    return {
        "format": FORMAT,
        "source": {"name": Path(plan.source.given).resolve().name, "revision": plan.source.revision},
        "parents": upcycling.get("parents", {}),
        "upcycling": upcycling.get("settings", {}),
        "model_type": plan.native.model_type,
        "text_model_type": text.model_type,
        "is_exact": plan.is_exact,
        "dense_layers_as_equal_experts": plan.equal_layers,
        "bytes": plan.mapping.num_bytes,
        "extra_bytes": plan.num_extra_bytes,
        "parameters": {"total": plan.mapping.num_parameters},
        "not_carried": not_carried(plan),
        "mapping": describe_mapping(plan.mapping),
        "proof": describe_proof(findings),
        "not_proved": plan.not_proved,
        "files_sha256": hashes,
        "settings": {"to": plan.args.to, "mean_experts": plan.args.mean_experts},
        "versions": {"vlmoe": __version__, **{package: version(package) for package in PACKAGES}},
    }


def not_carried(plan: ExportPlan) -> dict[str, Any]:
    """Settings that only matter in training, and that the written classes have no place for."""
    moe = plan.config.text_moe
    return {} if moe is None else {"text_moe.router_z_loss_coef": moe.router_z_loss_coef}


def write_receipt(plan: ExportPlan, findings: Findings, hashes: dict[str, str], folder: Path) -> None:
    """Writes the receipt into the exported checkpoint."""
    text = json.dumps(build_receipt(plan, findings, hashes), indent=2, ensure_ascii=False) + "\n"
    (folder / EXPORT_RECEIPT_NAME).write_text(text, encoding="utf-8")


def describe_receipt(receipt: dict[str, Any]) -> str:
    """What was exported, for people."""
    proof = receipt["proof"]
    lines = [
        f"{receipt['model_type']} around {receipt['text_model_type']}"
        if receipt["model_type"] != receipt["text_model_type"]
        else receipt["model_type"],
        f"{receipt['parameters']['total']:,} parameters, {format_bytes(receipt['bytes'])}",
        f"{'proved equal' if receipt['is_exact'] else 'the LLM is proved equal'}: largest gap "
        f"{proof['largest_gap']:.1e} standard deviations (limit {proof['largest_gap_limit']:.1e})",
    ]
    if layers := receipt["dense_layers_as_equal_experts"]:
        lines.append(
            f"dense layers {layers} are written as equal experts: {format_bytes(receipt['extra_bytes'])} more"
        )
    if not receipt["is_exact"]:
        lines.append("NOT equal: the experts of ViT or connector, which are written as their mean (--mean-experts)")
    if receipt["not_proved"]:
        lines.append(f"not proved: {receipt['not_proved']}")
    told = {what: gap for what, gap in proof["informative"].items() if GIVEN not in what}
    return "\n".join(lines + [f"{what}: {gap:.2g} standard deviations" for what, gap in told.items()])
