"""Tiny sparse models on disk: vlmoe ones to be exported, native ones to be imported. All parameters redrawn, so that
experts and routers are unlike.
"""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.conversion.host_parents import host_values
from tests import hosts, models, tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = {"all": None, "alternate": [0, 2]}
# What each is written as.
TARGETS = {
    ("llama", "all"): "mixtral",
    ("llama", "alternate"): "qwen2_moe",
    ("mistral", "all"): "mixtral",
    ("mistral", "alternate"): "mixtral",
    ("qwen2", "all"): "qwen2_moe",
    ("qwen2", "alternate"): "qwen2_moe",
    ("qwen3", "all"): "qwen3_moe",
    ("qwen3", "alternate"): "qwen3_moe",
}
IMAGE_TOKEN = 295  # the first id behind the tiny tokenizer's own
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
# Native families: experts narrower than the dense MLPs, some layers dense where the family can.
NATIVE_FIELDS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "head_dim": 16,
        "decoder_sparse_step": 2,
    },
}


def save_vlmoe(
    folder: Path, family: str = "llama", vision: str = "siglip", layers=None, dtype=torch.float32, text=None, **fields
) -> Path:
    """A vlmoe model whose LLM has unlike experts; ViT and connector as `fields` say."""
    moe = EXPERTS | {"layers": layers} | (fields.pop("text_moe", None) or {})
    config = VLMoEConfig(
        text_config=tiny.text_config(family, **(text or {})),
        vision_config=tiny.vision_config(vision),
        text_moe=moe,
        image_token_id=IMAGE_TOKEN,
        **fields,
    )
    model = tiny.redraw(VLMoEForConditionalGeneration(config)).eval().to(dtype)
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder)
    models.processor(vision).save_pretrained(folder)
    return folder


def save_hosted(
    folder: Path, family: str, layers=None, dtype=torch.float32, moe=None, root=None, shard_size="5GB", **fields
) -> Path:
    """A host's VLM, sparse in place, whose LLM has unlike experts; ViT and connector as `fields` say."""
    text_moe = EXPERTS | {"layers": layers} | (moe or {})
    values = host_values(hosts.config(family, **(root or {})))
    config = VLMoEConfig.from_dict(values | {"text_moe": text_moe} | fields)
    model = tiny.redraw(AutoModelForImageTextToText.from_config(config)).eval().to(dtype)
    model.generation_config.max_new_tokens = 12
    model.save_pretrained(folder, max_shard_size=shard_size)
    hosts.processor(family).save_pretrained(folder)
    return folder


def native_text(family: str, **fields):
    """A sparse family's configuration, or a dense one's."""
    own = NATIVE_FIELDS.get(family) or tiny.FAMILY_FIELDS.get(family, {})
    return AutoConfig.for_model(family, **(tiny.TEXT_FIELDS | own | fields))


def save_native_text(folder: Path, family: str, dtype=torch.float32, fused: bool = False, **fields) -> Path:
    """A sparse LM with its tokenizer."""
    model = tiny.redraw(AutoModelForCausalLM.from_config(native_text(family, **fields))).to(dtype)
    model.save_pretrained(folder, save_original_format=not fused)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_llava(folder: Path, family: str, vision: str = "clip", dtype=torch.float32, **fields) -> Path:
    """A LLaVA around a sparse or a dense LM, with its processor."""
    config = LlavaConfig(
        text_config=native_text(family, **fields),
        vision_config=tiny.vision_config(vision),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=tiny.NUM_PATCHES,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        projector_hidden_act="relu",
    )
    tiny.redraw(LlavaForConditionalGeneration(config)).to(dtype).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        tiny.image_processor(vision),
        tokenizer,
        patch_size=tiny.PATCH_SIZE,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tiny.CHATML.replace("message['content']", "(message['content'] | string)"),
        num_additional_image_tokens=1 if vision == "clip" else 0,
    )
    processor.save_pretrained(folder)
    return folder


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Text with a picture in the middle."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(6, 290, (14,), generator=generator)
    ids = torch.cat([text[:6], torch.full((tiny.NUM_PATCHES,), IMAGE_TOKEN), text[6:]])
    return {"input_ids": ids[None], "pixel_values": models.pixels(1, seed)}
