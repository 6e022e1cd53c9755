"""Dense VLMs of transformers as parents: they stay in their own class, sparse in place.

A vlmoe model and a LLaVA are taken as our own composite instead.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from modeling_vlmoe import VLMoEConfig
from modeling_vlmoe.configuration_in_place import BODY
from modeling_vlmoe.moe_config import part_config, sparse_fields

from .llava_parents import is_llava


def is_host(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a VLM of transformers that stays in its own class."""
    known = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return known and config.model_type != VLMoEConfig.model_type and not is_llava(config)


def check_dense_host(given: str, config: Any) -> None:
    """A VLM that is made sparse in place has a dense LLM, whose configuration is apart from the whole's.

    Raises:
        ValueError: naming what it has.
    """
    text = part_config(config, "text")
    if declared := sparse_fields(text):
        raise ValueError(
            f"--vlm-model {given} is a {config.model_type} model whose LLM is already sparse: its {text.model_type} "
            f"configuration has {', '.join(declared)}. Only dense models are upcycled; give one."
        )
    if text is config:
        raise ValueError(
            f"--vlm-model {given} is a {config.model_type} model, whose configuration holds none of its own for the "
            "LLM; experts' settings would have no home. Give a model with a text_config."
        )


def host_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The JSON values from which `VLMoEConfig.from_dict` makes the configuration of the same VLM, sparse in place."""
    return config.to_dict() | {BODY: config.model_type}
