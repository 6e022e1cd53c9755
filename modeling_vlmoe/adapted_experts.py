"""Experts with low-rank pairs beside their weights: what LoRA's `A` and `B` are to them, never added to the weights.

While experts are copies of one another that nothing trains, as after upcycling, their products are the same too: they
are then run as one base with a pair per expert.
"""

from typing import Any

import torch
from torch import Tensor

from .grouped_experts import full_experts, run_grouped
from .hollow_tensors import is_hollow
from .shared_base import LowRank, SharedBase, run_shared_base

SAMPLED = 16  # rows, and columns of each, per expert that are compared at every pass


def _marks(tensors: list[Tensor]) -> tuple:
    """What changes when weights are replaced or written; those made for inference alone count no writes."""
    return tuple((one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors)


def _sample(stack: Tensor) -> Tensor:
    """Some numbers of each expert, (E, rows, columns), from all over its weight."""
    rows, columns = (max(1, side // SAMPLED) for side in stack.shape[1:])
    return stack[:, rows - 1 :: rows, columns - 1 :: columns]


@torch.no_grad()
def are_copies(experts: Any) -> bool:
    """Whether experts are copies of one another that nothing trains.

    They are compared once, and again when the weights are replaced or written. What is written past autograd's
    notice (`tensor.data`, as PEFT does when it merges) is noticed by a sample from all over the weights, which is
    compared every time; a write to a few numbers is not. Weights without numbers are none.
    """
    tensors = [getattr(experts, name) for name in experts.stacks]
    if experts.num_experts == 1 or any(tensor.requires_grad or is_hollow(tensor) for tensor in tensors):
        return False
    for tensor in tensors:
        sample = _sample(tensor)
        if not torch.equal(sample, sample[:1].expand_as(sample)):
            return False
    known = experts.__dict__.get("_copies")
    if known is None or known[0] != _marks(tensors):
        found = all(torch.equal(tensor[0], other) for tensor in tensors for other in tensor[1:])
        known = experts.__dict__["_copies"] = (_marks(tensors), found)
    return known[1]


def _shared_base(experts: Any, pairs: dict[str, LowRank], dropout: float) -> SharedBase:
    """Experts that are copies, as one base."""
    up = experts.input_stack
    up_bias, down_bias = (getattr(experts, f"{name}_bias", None) for name in (up, "down_proj"))
    weights = getattr(experts, up)[0], experts.down_proj[0]
    both = pairs.get(up), pairs.get("down_proj")
    return SharedBase(experts, experts.num_experts, *weights, *both, up_bias, down_bias, dropout)


def run_pairs(experts: Any, pairs: dict[str, LowRank], x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What experts with these pairs beside their weights make of tokens, (T, O); arguments as of `Experts.forward`."""
    dropout = experts.lora_dropout if experts.training else 0.0
    if are_copies(experts):
        with torch.autocast(device_type=x_TD.device.type, enabled=False):
            base, x = _shared_base(experts, pairs, dropout), x_TD.to(experts.down_proj.dtype)
            return run_shared_base(base, x, expert_TK, weight_TK).to(x_TD.dtype)
    up_pair, down_pair = pairs.get(experts.input_stack), pairs.get("down_proj")
    full = full_experts(experts, up_pair=up_pair, down_pair=down_pair, dropout=dropout)
    return run_grouped(full, x_TD, expert_TK, weight_TK)
