"""The classifier's models: small dense towers with new weights, and the sparse model that a dense one becomes.

The sparse model is the dense one upcycled in memory: each expert is the dense MLP, plus noise that tells the experts
apart, since experts that are alike give the routers no gradient (MATHS 1 and 2).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, SiglipImageProcessorPil, SiglipVisionConfig

from modeling_vlmoe import VLMoEConfig, VLMoEForSequenceClassification, VLMoEProcessor
from modeling_vlmoe.mlp_layouts import find_layout
from modeling_vlmoe.text_gate import silence
from modeling_vlmoe.towers import sparse_blocks
from modeling_vlmoe.visible_text import IMAGE_PARTS

from ..demo.parents import train_tokenizer
from .arguments import ClassifyArguments
from .data import Data

# Of ImageNet, as the source documents have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_HEADS = 4


def build_processor(args: ClassifyArguments, data: Data) -> VLMoEProcessor:
    """A processor whose tokenizer knows the words of the data.

    Args:
        args: with `image_size` and `patch_size` resolved.
        data: the rows.
    """
    texts = list(dict.fromkeys(row.text for row in data.train))
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([[{"role": "user", "content": text}] for text in texts])
    side, _ = image_sizes(args)
    size = {"height": side, "width": side}
    images = SiglipImageProcessorPil(size=size, image_mean=list(MEAN), image_std=list(STD), do_convert_rgb=True)
    return VLMoEProcessor.from_parents(images, tokenizer, num_image_tokens=num_patches(args))


def num_patches(args: ClassifyArguments) -> int:
    """Patches of an image, each of them a token."""
    side, patch = image_sizes(args)
    return (side // patch) ** 2


def image_sizes(args: ClassifyArguments) -> tuple[int, int]:
    """Pixels of an image's side and of a patch's, once they are resolved."""
    assert args.image_size is not None
    assert args.patch_size is not None
    return args.image_size, args.patch_size


def dense_config(args: ClassifyArguments, processor: VLMoEProcessor, labels: list[str]) -> VLMoEConfig:
    """The dense model's configuration: a SigLIP ViT and a Qwen3, new and small."""
    tokenizer, width = processor.tokenizer, args.hidden_size
    image_size, patch_size = image_sizes(args)
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=args.text_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS // 2,
        head_dim=width // NUM_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=width**-0.5,  # 0.02 is for widths of thousands: here it learns slowly
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=NUM_HEADS,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    return VLMoEConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
    )


def sparse_config(dense: VLMoEConfig, args: ClassifyArguments) -> VLMoEConfig:
    """The same model with experts in the upper half of the ViT and in the connector."""
    values = dense.to_dict()
    moe = {
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "router_type": args.router,
        # Over a batch of all tasks: it keeps all experts in use, and each task may still have its own.
        "router_aux_loss_coef": args.balance,
    }
    return VLMoEConfig.from_dict(values | {"vision_moe": dict(moe), "connector_moe": dict(moe)})


@torch.no_grad()
def upcycle_classifier(dense: Any, args: ClassifyArguments) -> VLMoEForSequenceClassification:
    """The sparse model of a dense classifier: all else is copied, and each expert is the dense MLP plus noise.

    Args:
        dense: a `VLMoEForSequenceClassification` without experts.
        args: experts, top-k, router and noise.
    """
    sparse = VLMoEForSequenceClassification(sparse_config(dense.config, args))
    blocks = dict(sparse_blocks(sparse))
    missing, unexpected = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert all(any(name.startswith(f"{path}.") for path in blocks) for name in [*missing, *unexpected])
    for path, block in blocks.items():
        mlp = dense.get_submodule(path)
        block.experts.copy_dense(mlp, find_layout(mlp, path))
        for parameter in block.experts.parameters():
            if parameter.ndim == 3:  # (experts, out, in); biases stay alike
                parameter.add_(torch.randn_like(parameter), alpha=args.expert_noise * parameter.std().item())
        if (gate := block.router.text_gate) is not None:
            gate.readout.normal_(std=args.gate_spread)  # what reads alike is sent alike, from the first step on
    return sparse


def text_gates_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all text gates."""
    gates = [block.router.text_gate for _, block in sparse_blocks(model)]
    return [parameter for gate in gates if gate is not None for parameter in gate.parameters()]


def is_gated(model: Any) -> bool:
    """Whether the text routes a model's images."""
    return any(moe is not None and moe.router_type == "attention" for moe in map(model.config.moe, IMAGE_PARTS))


@contextmanager
def silence_gates(model: nn.Module) -> Iterator[None]:
    """Within it the text gates add nothing, so that routers read the image alone."""
    silence(model)
    try:
        yield
    finally:
        silence(model, False)
