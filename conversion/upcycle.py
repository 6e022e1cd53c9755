"""Dense parents in, sparse vision-language model out: the story, top to bottom.

>>> parents = {"text_model": "Qwen/Qwen3-0.6B", "vision_model": "google/siglip-base-patch16-224"}
>>> upcycle(UpcycleArguments(**parents, output_dir="out"))
PosixPath('out')
"""

import tempfile
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_vlmoe import VLMoEForConditionalGeneration, register
from modeling_vlmoe.delta_experts import refuse_delta_config

from .arguments import NATIVE, UpcycleArguments
from .export import open_checkpoint, write_export
from .export_plan import check_features, check_head, check_no_text_gate, native_text_config
from .lossy_routing import describe_lossy
from .meta_models import build_on_meta
from .native_arguments import ExportArguments
from .output_folder import check_output_folder, check_parents_survive
from .planning import plan_upcycle
from .plans import UpcyclePlan
from .proved_writing import write_proved
from .summaries import summarise


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


def check_native(plan: UpcyclePlan) -> PreTrainedConfig:
    """Refuses early what could not be exported.

    Returns:
        The configuration of the LLM that is to be written.

    Raises:
        ValueError: as `export`.
    """
    refuse_delta_config(plan.config, "--format native")
    if plan.is_lossy:
        raise ValueError(
            f"--format native cannot be written: {describe_lossy(plan.config)[0]}. Leave --format out; see `vlmoe "
            "export`."
        )
    model = build_on_meta(lambda: VLMoEForConditionalGeneration(plan.config))  # resolves what is left open
    check_no_text_gate(plan.config)
    check_head(plan.config)
    check_features(model)
    return native_text_config(plan.config)[1]


def write_native(plan: UpcyclePlan, output: Path, force: bool) -> Path:
    """Writes a plan as a native checkpoint: upcycled and proved beside the output, then exported and proved again.

    Raises:
        ValueError, ProofError, OSError: as `upcycle` and `export`.
    """
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
    written = "\n".join([summarise(plan.mapping, draws_connector="vlm" not in plan.parents), *plan.remarks])
    if args.format != NATIVE:
        return written
    text = check_native(plan)
    return f"{written}\nall this in between; what is kept is exported from it: llava around {text.model_type}"
