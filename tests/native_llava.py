"""A vlmoe model of a sparse Qwen3, and the LLaVA of transformers with the same weights, Qwen3-MoE inside."""

from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, Qwen3MoeConfig

from modeling_vlmoe import VLMoEForConditionalGeneration
from tests import tiny
from tests.models import EXPERTS, processor, sparse_model

RENAMES = {"connector.mlp.": "multi_modal_projector.", "mlp.router.": "mlp.gate."}


def vlmoe_model(**fields) -> VLMoEForConditionalGeneration:
    """Sparse in the LLM alone, with the processor's image token; it answers in letters, up to the limit."""
    ours = processor()
    image_token_id = ours.image_token_id
    parts = {"text_moe": EXPERTS, "vision_moe": None, "connector_moe": None, "image_token_id": image_token_id}
    model = sparse_model("qwen3", "siglip", **(parts | fields))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # Bytes that are no characters would come out differently whole and in pieces.
    others = [
        id
        for id in range(model.config.text_config.vocab_size)
        if not ours.tokenizer.decode([id], skip_special_tokens=True).isalpha()
    ]
    model.generation_config.suppress_tokens = others
    return model


def save_vlmoe(folder: Path, **fields) -> Path:
    vlmoe_model(**fields).save_pretrained(folder)
    processor().save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def native_model(model: VLMoEForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same function, built of transformers' own classes."""
    text = model.config.text_config
    moe = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": text.moe_intermediate_size}
    config = LlavaConfig(
        text_config=Qwen3MoeConfig(**(tiny.TEXT_FIELDS | tiny.FAMILY_FIELDS["qwen3"] | moe | EXPERTS)),
        vision_config=tiny.vision_config("siglip"),
        image_token_id=model.config.image_token_id,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy="full",
        image_seq_length=tiny.NUM_PATCHES,
    )
    config.text_config.norm_topk_prob = True
    native = LlavaForConditionalGeneration(config)
    weights = model.state_dict()
    for ours, theirs in RENAMES.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    native.load_state_dict(weights)
    native.generation_config = model.generation_config
    return native.eval()


def save_native(folder: Path) -> Path:
    """The native checkpoint, with LLaVA's own processor over the same tokenizer, image processor and template."""
    ours = processor()
    native_model(vlmoe_model()).save_pretrained(folder)
    LlavaProcessor(
        ours.image_processor,
        ours.tokenizer,
        patch_size=tiny.PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=ours.chat_template,
        image_token=ours.image_token,
    ).save_pretrained(folder)
    return Path(folder)
