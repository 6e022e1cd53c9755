"""Dense parents in, sparse vision-language model out: the story, top to bottom.

>>> parents = {"text_model": "Qwen/Qwen3-0.6B", "vision_model": "google/siglip-base-patch16-224"}
>>> upcycle(UpcycleArguments(**parents, output_dir="out"))
PosixPath('out')
"""

import errno
import hashlib
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from transformers.dynamic_module_utils import custom_object_save

from modeling_vlmoe import VLMoEForConditionalGeneration, register
from modeling_vlmoe.companions import HISTORY_NAME
from modeling_vlmoe.model_cards import write_card
from modeling_vlmoe.weight_fingerprint import fingerprint

from .arguments import NATIVE, UpcycleArguments
from .mapping import Mapping
from .meta_models import build_on_meta
from .output_folder import check_output_folder, check_parents_survive, check_space, whole_or_nothing
from .planning import UpcyclePlan, plan_upcycle
from .receipt import build_receipt, write_receipt
from .streaming import write_checkpoint
from .verify import prove

logger = logging.getLogger(__name__)


def upcycle(args: UpcycleArguments) -> Path:
    """Writes a sparse vision-language model that computes what its dense parents compute.

    It is written into a temporary folder beside the output, proved there against the parents, and moved into place;
    whatever fails leaves nothing behind.

    Args:
        args: What to make of what.

    Returns:
        The output folder.

    Raises:
        ValueError: for whatever the user can mend.
        ProofError: a ValueError, when the result does not compute what the parents compute.
        OSError: when the disk is full.
    """
    if args.dry_run:
        raise ValueError("dry_run is set, but upcycle() writes; preview() says what would be written.")
    if args.output_dir is None:
        raise ValueError("Give --output-dir, the folder of the model.")
    plan, output = prepare(args), Path(args.output_dir).expanduser()
    if args.format == NATIVE:
        return write_native(plan, output, args.force)
    return write_proved(plan, output, args.force)


def write_proved(plan: UpcyclePlan, output: Path, force: bool) -> Path:
    """Writes what a plan says, proves it, and moves it into place.

    Raises:
        ValueError, ProofError, OSError: as `upcycle`.
    """
    check_space(output, plan.mapping.num_bytes)
    logger.info("Writing %s into %s.", format_bytes(plan.mapping.num_bytes), output)
    with whole_or_nothing(output, force) as folder:
        try:
            file_hashes = write_checkpoint(folder, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
            write_companions(plan, folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(
                    errno.ENOSPC, f"The disk is full; {output} needs about {format_bytes(plan.mapping.num_bytes)}"
                ) from error
            raise
        logger.info("Running the written files against the parents.")
        gaps = prove(plan, folder, reads_all=False)
        small = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in file_hashes]
        file_hashes |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in small}
        write_receipt(folder, build_receipt(plan, gaps, dict(sorted(file_hashes.items())), fingerprint(folder)))
        write_card(folder, name=output.resolve().name)  # of the receipt, so its hash is not in it
    return output


def check_native(plan: UpcyclePlan) -> None:
    """Refuses early what could not be exported.

    Raises:
        ValueError: as `export`.
    """
    from .export_plan import check_features, check_head, native_text_config

    model = build_on_meta(lambda: VLMoEForConditionalGeneration(plan.config))  # resolves what is left open
    native_text_config(plan.config)
    check_head(plan.config)
    check_features(model)


def write_native(plan: UpcyclePlan, output: Path, force: bool) -> Path:
    """Writes a plan as a native checkpoint: upcycled and proved beside the output, then exported and proved again.

    Raises:
        ValueError, ProofError, OSError: as `upcycle` and `export`.
    """
    from .export import open_checkpoint, write_export
    from .native_arguments import ExportArguments

    check_native(plan)
    beside = output.resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.upcycled-", dir=beside) as temporary:
        model = write_proved(plan, Path(temporary) / "model", force=False)
        return write_export(open_checkpoint(output.name, model), ExportArguments(force=force), output)


def prepare(args: UpcycleArguments) -> UpcyclePlan:
    """The plan, once the output folder (where one is named) is known to be free."""
    register()
    output = None if args.output_dir is None else Path(args.output_dir).expanduser()
    if output is not None:
        check_output_folder(output, args.force)
    plan = plan_upcycle(args)
    if output is not None:
        for parent in plan.parents.values():
            check_parents_survive(output, [parent.folder, *parent.reader.files])
    return plan


def preview(args: UpcycleArguments) -> str:
    """What `upcycle` would write, for people; nothing is written, and no output folder need be named.

    Raises:
        ValueError: as `upcycle` would.
    """
    plan = prepare(args)
    if args.format == NATIVE:
        check_native(plan)
    return summarise(plan.mapping, draws_connector="vlm" not in plan.parents)


def write_companions(plan: UpcyclePlan, folder: Path) -> None:
    """Writes what a checkpoint holds beside its weights: configurations, processor, the model's code, and the
    trainings that a dense vlmoe parent has been through.
    """
    plan.config.save_pretrained(folder)
    plan.generation.save_pretrained(folder)
    plan.processor.save_pretrained(folder)
    custom_object_save(build_on_meta(lambda: VLMoEForConditionalGeneration(plan.config)), folder)
    for parent in plan.parents.values():
        if parent.role == "vlm" and (parent.folder / HISTORY_NAME).is_file():
            shutil.copyfile(parent.folder / HISTORY_NAME, folder / HISTORY_NAME)


def format_bytes(count: int) -> str:
    """1234567890 as 1.23 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"


def summarise(mapping: Mapping, draws_connector: bool = False) -> str:
    """What would be written, for people: like tensors of all layers in one line."""
    groups: dict[tuple[str, str], list] = {}
    for assignment in mapping.assignments:
        name = ".".join("*" if piece.isdigit() else piece for piece in assignment.spec.name.split("."))
        groups.setdefault((name, assignment.operation), []).append(assignment)
    lines = []
    for (name, operation), members in groups.items():
        first = members[0]
        sources = f" of {' + '.join(first.dense_names)}" if first.dense_names else ""
        times = f"{len(members)} x " if len(members) > 1 else ""
        dtype = str(first.spec.dtype).removeprefix("torch.")
        lines.append(f"{operation:8}{times}{name} {list(first.spec.shape)} {dtype}{sources}")
    if draws_connector:
        lines.append("the dense connector that these are made of is drawn: the parents have none")
    for role, reasons in mapping.dropped.items():
        lines += [f"dropped {count} x {role}: {reason}" for reason, count in Counter(reasons.values()).items()]
    lines.append(
        f"{mapping.num_parameters:,} parameters, {mapping.num_active_parameters:,} active per token, "
        f"{format_bytes(mapping.num_bytes)}"
    )
    return "\n".join(lines)
