"""Upcycling in memory: two dense parents become one vision-language model, without a checkpoint in between."""

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM

from .connector import VLMoEConnector
from .image_inputs import find_form
from .moe_config import sparse_fields
from .recorders import install_recorders
from .text_head import find_head
from .towers import make_sparse, mark_initialized

VISION_TOWERS = ("vision_model", "vision_tower", "visual")  # what a ViT is called inside a larger model


def load_parents(vision_model_name_or_path: str, text_model_name_or_path: str, **kwargs: Any) -> tuple[Any, Any]:
    """Loads a dense LLM and a ViT, in the LLM's dtype.

    Raises:
        ValueError: if the LLM is sparse already, or the ViT does not read images.
    """
    kwargs.setdefault("use_safetensors", True)  # pickle weights are never loaded
    text = AutoModelForCausalLM.from_pretrained(text_model_name_or_path, **kwargs)
    vision = AutoModel.from_pretrained(vision_model_name_or_path, **kwargs)
    vision = next((getattr(vision, name) for name in VISION_TOWERS if hasattr(vision, name)), vision)
    if text.config.get_text_config() is not text.config:
        raise ValueError(
            f"{text_model_name_or_path} is a {text.config.model_type}, of which the LLM is a part. Give an LLM alone, "
            "or take it out by `vlmoe upcycle --text-model`."
        )
    if find_form(type(vision)).sizes is None and vision.main_input_name != "pixel_values":
        raise ValueError(
            f"{vision_model_name_or_path} is a {vision.config.model_type}, which does not read images. Give a ViT."
        )
    if declared := sparse_fields(text.config):
        raise ValueError(
            f"{text_model_name_or_path} is a {text.config.model_type}, which is sparse already (it declares "
            f"{', '.join(declared)}); upcycling starts from a dense LLM. Give one, or keep its own experts: "
            "`vlmoe import`."
        )
    # A checkpoint holds one dtype, and would widen the LLM to a float32 ViT's.
    return text, vision.to(text.dtype)


def adopt_parents(model: Any, text: Any, vision: Any, experts_implementation: str | None) -> None:
    """Puts the parents' own modules in the place of this model's, made sparse, with a new connector."""
    config, body = model.config, model.model
    towers: list[tuple[str, Any, Any, Any]] = [
        ("language_model", text.base_model, config.text_moe, config.text_config),
        ("vision_tower", vision, config.vision_moe, config.vision_config),
    ]
    for name, tower, moe, sub_config in towers:
        sub_config._attn_implementation = tower.config._attn_implementation
        for module in tower.modules():
            if getattr(module, "config", None) is tower.config:
                module.config = sub_config
        if moe is not None:
            make_sparse(tower, moe, experts_implementation, True, config.text_config.hidden_size)
        setattr(body, name, tower)
    _, model.lm_head = find_head(text)
    mark_initialized(model.lm_head)
    body.connector = VLMoEConnector(config).to(text.dtype).to(text.device)
    model.generation_config = text.generation_config
    model.post_init()
    body.post_init()
    install_recorders(body)
