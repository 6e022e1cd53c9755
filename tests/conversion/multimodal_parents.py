"""Tiny multimodal checkpoints as users have them: a text tower, a ViT and a connector under one configuration, with
tokenizer and image processor beside them. All parameters redrawn.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import tiny

ROPE_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": tiny.PATCH_SIZE,
    "out_hidden_size": tiny.TEXT_FIELDS["hidden_size"],
}
# What each family's text tower needs beside the tiny fields.
TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "mistral3": {"model_type": "mistral", "head_dim": 8},
    "qwen3_5": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "qwen2_5_vl": {"rope_parameters": ROPE_SECTIONS},
    "qwen3_vl": {"rope_parameters": ROPE_SECTIONS, "head_dim": 8},
}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": tiny.VISION_FIELDS,
    "mistral3": tiny.VISION_FIELDS | {"model_type": "pixtral", "head_dim": 12, "image_size": 64},
    "qwen3_5": QWEN_VISION | {"num_position_embeddings": 16},
    "qwen2_5_vl": QWEN_VISION | {"window_size": 32, "fullatt_block_indexes": [1]},
    "qwen3_vl": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
}
ROOT: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 1, "tie_word_embeddings": True},
    "mistral3": {"spatial_merge_size": 1, "tie_word_embeddings": False},
}


def whole_config(family: str, **root):
    return AutoConfig.for_model(
        family,
        text_config=tiny.TEXT_FIELDS | TEXT[family],
        vision_config=dict(VISION[family]),
        **(ROOT.get(family, {}) | root),
    )


def save_whole(folder: Path, family: str, dtype=torch.float32, shard_size="5GB", **root) -> Path:
    """Writes a whole model with its tokenizer and image processor, under the names that the host saves by."""
    model = tiny.redraw(AutoModelForImageTextToText.from_config(whole_config(family, **root))).eval()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tiny.tokenizer().save_pretrained(folder)
    tiny.image_processor("siglip").save_pretrained(folder)
    return Path(folder)
