"""Which families of transformers are text or vision backbones or whole VLMs, as its own tables of auto classes say.

A family of VLMs is a configuration registered for `AutoModelForImageTextToText`; a text family is one registered for
`AutoModelForCausalLM`. A vision family is one registered for `AutoModel`, `AutoBackbone` or image classification whose
model reads images and no text.
"""

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TEXT_TABLES = ("MODEL_FOR_CAUSAL_LM_MAPPING",)
VISION_TABLES = ("MODEL_MAPPING", "MODEL_FOR_BACKBONE_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING")
VLM_TABLES = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",)
# A vision model's forward has one of the first, and none of the others.
IMAGE_INPUTS = ("pixel_values", "pixel_values_videos", "grid_thw", "image_grid_thw")
TEXT_INPUTS = ("input_ids", "decoder_input_ids", "input_texts", "task_inputs")


def registered_class(family: str, tables: Iterable[str]) -> Any:
    """The first model class that one of these tables gives a family; None where none of them has one that is there."""
    config_class = CONFIG_MAPPING[family]
    for table in tables:
        try:
            found = getattr(modeling_auto, table)[config_class]
        except (KeyError, ValueError, ImportError):  # not registered, or registered under a name that does not exist
            continue
        found = found[0] if isinstance(found, tuple) else found
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def registered_names(tables: Iterable[str]) -> list[str]:
    """The families of these tables, without importing their models."""
    names = {name for table in tables for name in getattr(modeling_auto, f"{table}_NAMES")}
    return sorted(names & set(CONFIG_MAPPING))


def reads_images_only(family: str) -> bool:
    """Whether a family's model reads images (or patches of them) and no text."""
    model_class = registered_class(family, VISION_TABLES)
    names = set() if model_class is None else set(inspect.signature(model_class.forward).parameters)
    return bool(names & set(IMAGE_INPUTS)) and not names & set(TEXT_INPUTS)


@cache
def registered_families(part: str) -> tuple[str, ...]:
    """The families of a part, "text", "vision" or "vlm"; the first call for vision imports every model (10 s)."""
    if part == "text":
        return tuple(registered_names(TEXT_TABLES))
    if part == "vlm":
        return tuple(registered_names(VLM_TABLES))
    return tuple(family for family in registered_names(VISION_TABLES) if reads_images_only(family))


def config_class(family: str) -> type[PreTrainedConfig]:
    """The configuration class of a family."""
    return CONFIG_MAPPING[family]
