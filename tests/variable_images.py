"""Tiny ViTs that take images of any size, each with its own image processor, and models around them."""

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    PixtralImageProcessorPil,
    PreTrainedModel,
    Qwen2VLImageProcessorPil,
    Siglip2ImageProcessorPil,
)

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.image_inputs import find_form
from tests import tiny
from tests.models import EXPERTS

PATCH = 4
QWEN = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 20,
}
FIELDS = {
    "pixtral": tiny.VISION_FIELDS | {"patch_size": PATCH, "image_size": 64, "head_dim": 12},
    "siglip2_vision_model": tiny.VISION_FIELDS | {"patch_size": PATCH, "num_patches": 16},
    "qwen2_5_vl_vision": QWEN | {"window_size": 16, "fullatt_block_indexes": [1]},
    "qwen3_vl_vision": QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "qwen3_5_vision": QWEN | {"num_position_embeddings": 16},
}
TOWERS = tuple(FIELDS)
SPARSE_TOWERS = TOWERS[:3]
# Width, height: large and small, wide and tall, beyond what the image processors keep and no multiple of a patch.
SIZES = ((24, 24), (8, 32), (32, 8), (21, 13), (100, 40), (5, 7))


def vision_config(family: str):
    return AutoConfig.for_model(family, **FIELDS[family])


def vision_model(family: str, seed: int = 1) -> PreTrainedModel:
    return tiny.redraw(AutoModel.from_config(vision_config(family)), seed).eval()


def image_processor(family: str):
    if family == "pixtral":
        return PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": PATCH, "width": PATCH})
    if family == "siglip2_vision_model":
        return Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=30)
    return Qwen2VLImageProcessorPil(patch_size=PATCH, size={"shortest_edge": 64, "longest_edge": 1024})


def pictures(sizes=SIZES) -> list[Image.Image]:
    """Pictures of noise, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator) for width, height in sizes]
    return [Image.fromarray(one.numpy()) for one in noise]


def sparse_model(family: str, **fields) -> VLMoEForConditionalGeneration:
    """Sparse in every part that can be, every parameter redrawn."""
    parts = {"text_moe": EXPERTS, "connector_moe": EXPERTS}
    if family in SPARSE_TOWERS:
        parts["vision_moe"] = EXPERTS
    config = VLMoEConfig(
        text_config=tiny.text_config("llama"),
        vision_config=vision_config(family),
        image_token_id=processor(family).image_token_id,
        **(parts | fields),
    )
    return tiny.redraw(VLMoEForConditionalGeneration(config)).eval()


def processor(family: str) -> VLMoEProcessor:
    form = find_form(type(vision_model(family)))
    return VLMoEProcessor.from_parents(
        image_processor(family),
        tiny.tokenizer(),
        image_sizes_name=form.sizes,
        image_token_side=form.token_side(vision_config(family)),
    )
