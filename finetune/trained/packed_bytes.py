"""What packed weights take in a plan, whose model has them whole.

An expert stack is a tensor again while its layer runs, and the pass back needs it: with activation checkpointing one
layer's are there at a time, without it all of them until the pass back is over, and nothing is saved.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from modeling_vlmoe.quantization import NF4_BLOCK, PART_PATHS
from modeling_vlmoe.sparse_moe import Experts

from .adapted_names import bare_name, is_added

TEXT = f"{PART_PATHS['text']}."


def packed_bytes(weight: Tensor, bits: int) -> int:
    """What a weight takes packed, its scales included: one of float32 for 64 numbers, or for a row."""
    if bits == 4:
        return weight.numel() // 2 + 4 * -(-weight.numel() // NF4_BLOCK)
    return weight.numel() + 4 * weight.numel() // weight.shape[-1]


def _packed_modules(model: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """The LLM's Linears and expert stacks, with the weights of each that are packed."""
    for name, module in model.named_modules():
        if not bare_name(name).startswith(TEXT) or is_added(name):
            continue
        if isinstance(module, Experts):
            yield module, [one for one in module.parameters(recurse=False) if one.ndim == 3]
        elif isinstance(module, nn.Linear):
            yield module, [module.weight]


def packing_saves(model: nn.Module, args: Any) -> tuple[int, int]:
    """The bytes that packing takes off a model's weights, and those of the weights that are unpacked at the peak.

    Args:
        model: as it is trained, with whole weights.
        args: the recipe, which says in how many bits.
    """
    saved, unpacked = 0, [0]
    for module, weights in _packed_modules(model):
        whole = sum(one.numel() * one.element_size() for one in weights)
        saved += whole - sum(packed_bytes(one, args.quantize_bits) for one in weights)
        if isinstance(module, Experts):
            unpacked.append(whole)
    return saved, max(unpacked) if args.activation_checkpointing else sum(unpacked)
