"""A tiny dense VLM of any family: its own class, with the sizes that its parts' configurations name made small."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .families import VLM_TABLES, config_class, registered_class
from .tiny_configs import FAMILY_FIELDS, SIZES
from .tiny_parents import MOST_PARAMETERS, redraw

# What the part of a VLM's configuration is called that holds an LLM; all others are ViTs, or sized like them.
TEXT_PARTS = ("text_config", "qformer_config", "decoder")
SECTIONS = "mrope_section"
MROPE = {"rope_type": "default", "rope_theta": 1e4, SECTIONS: [1, 1, 2]}  # of the half of a head
# What the parts of a family need beside, or otherwise: these cut heads too, by sizes that no configuration names.
VLM_FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    family: {"text_config": {"rope_parameters": MROPE}}
    for family in (
        "glm46v",
        "glm4v",
        "glm_ocr",
        "glmga",
        "paddleocr_vl",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_vl",
    )
}

VLM_FIELDS["mllama"] = {"vision_config": {"intermediate_layers_indices": [1, 2]}}
# What the whole of a family needs, so that its images can be read.
ROOT_FIELDS: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-2, -3]},
}


def names_sections(rope: Any) -> bool:
    """Whether the settings of rotary positions cut a head into sections of time, height and width."""
    return isinstance(rope, dict) and SECTIONS in rope


def part_fields(name: str, part: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that one part's configuration names, small."""
    sizes = SIZES["text" if name in TEXT_PARTS else "vision"]
    own = FAMILY_FIELDS.get(part.model_type, {})
    known = set(part.to_dict()) | set(part.attribute_map)
    fields = {field: value for field, value in sizes.items() if field in known} | own
    if names_sections(getattr(part, "rope_parameters", None)):
        fields["rope_parameters"] = dict(MROPE)
    kept = {field: value for field, value in fields.items() if value is not None}
    return kept | ({"model_type": part.model_type} if part.model_type else {})


def tiny_vlm_config(family: str) -> PreTrainedConfig:
    """A tiny configuration of a family of VLMs."""
    made: Any = config_class(family)()
    fields: dict[str, Any] = {}
    for name in made.sub_configs or {}:
        if (part := getattr(made, name, None)) is not None:
            fields[name] = part_fields(name, part) | VLM_FIELDS.get(family, {}).get(name, {})
    return config_class(family)(**(fields | ROOT_FIELDS.get(family, {})))


def build_vlm(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny dense VLM, redrawn.

    Raises:
        ValueError: when it is not tiny.
    """
    model_class = registered_class(family, VLM_TABLES)
    with torch.device("meta"):
        size = sum(one.numel() for one in model_class._from_config(tiny_vlm_config(family)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the tiny {family} has {size:,} parameters: name its sizes in VLM_FIELDS (tiny_vlms.py)")
    return redraw(model_class._from_config(tiny_vlm_config(family)).float(), seed).eval()
