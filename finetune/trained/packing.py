"""LoRA on weights in 4 or 8 bits: how the model is loaded, and what is refused before."""

from typing import Any

from modeling_vlmoe.conversion.meta_models import build_vlm
from modeling_vlmoe.delta_experts import refuse_delta_config
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.parts import find_towers
from modeling_vlmoe.quantization import PART_PATHS, VLMoEQuantizationConfig

from ..arguments import FinetuneArguments
from ..checkpoints import load_base_config
from ..settings import FinetuneSettings


def _beside_the_llm(config: Any) -> list[str]:
    """The paths of what a host's VLM has beside its LLM, to be left as it is.

    Raises:
        ValueError: if its LLM is where packing does not look.
    """
    model: Any = build_vlm(config)
    (path, _), wanted = find_towers(model)["text"], PART_PATHS["text"]
    if path != wanted:
        raise ValueError(
            f"quantize_bits packs the LLM at {wanted}, but {type(model).__name__.removeprefix('Sparse')} has it at "
            f"{path}. Leave quantize_bits out."
        )
    prefix, _, own = wanted.rpartition(".")
    return [f"{prefix}.{name}" for name, _ in model.base_model.named_children() if name != own]


def check_packable(config: Any, settings: FinetuneSettings) -> None:
    """Refuses to pack experts that cannot be, from the model's configuration alone.

    Raises:
        ValueError: saying what to do.
    """
    if settings.quantize_bits is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"quantize_bits is {settings.quantize_bits}, but the model's weights are saved packed already. Leave "
                "quantize_bits out."
            )
        if config.text_moe is not None:
            refuse_delta_config(config, f"quantize_bits {settings.quantize_bits}", ("text",))
        if is_in_place(config):
            _beside_the_llm(config)


def packing(args: FinetuneArguments) -> dict[str, Any]:
    """What `from_pretrained` is told, for the LLM to be packed as a recipe says, where it runs."""
    if args.quantize_bits is None:
        return {}
    config = load_base_config(args.model, **args.hub)
    beside = _beside_the_llm(config) if is_in_place(config) else None
    packed = VLMoEQuantizationConfig(args.quantize_bits, llm_int8_skip_modules=beside)
    return {"quantization_config": packed, "device_map": {"": args.device}}
