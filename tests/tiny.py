"""Tiny dense parents, built from real transformers classes: what a user would have downloaded, in seconds.

Every parameter is redrawn wide (std 0.2), because a freshly initialised model hides mistakes: zeroing all MLP biases
of a fresh tiny SigLIP moves its features by 2e-6 only.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT_FAMILIES = ("llama", "qwen3", "phi3")
VISION_FAMILIES = ("clip", "siglip")
IMAGE_SIZE, PATCH_SIZE = 24, 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

TEXT_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION_FIELDS = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
# The family's extra fields: Qwen3 sets its head width apart.
FAMILY_FIELDS = {"qwen3": {"head_dim": 8}}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@torch.no_grad()
def redraw(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Redraws every parameter so that each of them matters to the output; norm weights stay around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        is_norm_weight = "norm" in name and name.endswith("weight")
        parameter.copy_(noise + 1.0 if is_norm_weight else noise)
    return model


def text_config(family: str, **fields):
    return AutoConfig.for_model(family, **(TEXT_FIELDS | FAMILY_FIELDS.get(family, {}) | fields))


def vision_config(family: str, **fields):
    return AutoConfig.for_model(f"{family}_vision_model", **(VISION_FIELDS | fields))


def text_model(family: str, seed: int = 0, **fields) -> PreTrainedModel:
    return redraw(AutoModelForCausalLM.from_config(text_config(family, **fields)), seed).eval()


def vision_model(family: str, seed: int = 1, **fields) -> PreTrainedModel:
    return redraw(AutoModel.from_config(vision_config(family, **fields)), seed).eval()


def whole_model(family: str, seed: int = 1, **fields) -> PreTrainedModel:
    """A whole CLIP or SigLIP: the ViT with its text tower beside it."""
    text = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    config = AutoConfig.for_model(family, vision_config=VISION_FIELDS | fields, text_config=text, projection_dim=24)
    return redraw(AutoModel.from_config(config), seed).eval()


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens at most, with ChatML marks."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["what colour is the shape?", "the red circle is at the top left"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


def image_processor(family: str):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if family == "clip":
        return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return SiglipImageProcessorPil(size=size)


def save_text_parent(
    folder: Path, family: str, dtype=torch.float32, shard_size="5GB", chat_template=CHATML, **fields
) -> Path:
    """Writes a dense LLM with its tokenizer, as a Hub folder has them."""
    text_model(family, **fields).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer(chat_template).save_pretrained(folder)
    return Path(folder)


def save_vision_parent(folder: Path, family: str, dtype=torch.float32, whole: bool = False, **fields) -> Path:
    """Writes a ViT (or the whole CLIP or SigLIP around it) with its image processor."""
    model = whole_model(family, **fields) if whole else vision_model(family, **fields)
    model.to(dtype).save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    return Path(folder)
