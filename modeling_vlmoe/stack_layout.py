"""Stacks of matrices, one per expert, in the two layouts that they come in: ours, (E, O, I) in memory, and PEFT's `b`,
which is a view of (O, I, E): `grouped_mm` does not take it.

Memory that was never touched is what such stacks cost most (CPU): so a cast and a new layout are one step.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

from .hollow_tensors import device_type

Given = TypeVar("Given", Tensor, Tensor | None)

# A CPU lays out a stack in slices of about so many numbers, which its cache holds.
SLICE_NUMBERS = 2**17
FEW_EXPERTS = 16  # up to here permuting a stack of matrices into another layout is the quicker way (torch 2.13, CPU)


def _written(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack, (E, O, I), in a dtype, its matrices one after the other in memory."""
    if stack.is_contiguous():
        return stack.to(dtype)
    num_rows = max(1, SLICE_NUMBERS // (len(stack) * stack.shape[2]))
    out = torch.empty(stack.shape, dtype=dtype, device=stack.device)
    if device_type(stack) != "cpu" or num_rows >= stack.shape[1]:
        return out.copy_(stack)
    for into, some in zip(out.split(num_rows, 1), stack.split(num_rows, 1), strict=True):
        into.copy_(some.to(dtype))
    return out


def laid_out(stack: Given) -> Given:
    """A stack of matrices, (E, O, I), one after the other in memory, for one pass alone: to keep a copy for backward
    would be to keep another adapter.
    """
    return None if stack is None else _written(stack, stack.dtype)


def is_experts_last(stack: Tensor) -> bool:
    """Whether a stack, (E, O, I), lies in memory as (O, I, E)."""
    return not stack.is_contiguous() and stack.movedim(0, -1).is_contiguous()


def _laid(stack: Tensor, dtype: torch.dtype, are_experts_last: bool) -> Tensor:
    """A stack whose matrices lie one after the other, in a dtype, and laid out as said."""
    if not are_experts_last:
        return stack.to(dtype)
    if len(stack) <= FEW_EXPERTS:
        return stack.permute(1, 2, 0).to(dtype).contiguous().movedim(-1, 0)
    flat = stack.flatten(1).t()
    if stack.dtype == dtype:
        laid = flat.contiguous()
    else:
        laid = torch.empty(flat.shape, dtype=dtype, device=stack.device)
        num_rows = max(1, SLICE_NUMBERS // len(stack)) if device_type(stack) == "cpu" else len(flat)
        for into, some in zip(laid.split(num_rows), flat.split(num_rows), strict=True):
            into.copy_(some.contiguous())
    return laid.view(*stack.shape[1:], -1).movedim(-1, 0)


def laid_as(stack: Given, other: Given) -> Given:
    """A stack whose matrices lie one after the other, laid out in memory as another, and of its dtype."""
    return stack if stack is None or other is None else _laid(stack, other.dtype, is_experts_last(other))


class _Cast(torch.autograd.Function):
    """A stack in another dtype, its matrices one after the other; its gradient lies as the stack did."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.given = stack.dtype, is_experts_last(stack)
        return _written(stack, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _laid(gradient.contiguous(), *ctx.given), None


def cast_stack(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack, (E, O, I), in a dtype; where that is another one it is a copy, and laid out while it is made."""
    return stack if stack.dtype == dtype else _Cast.apply(stack, dtype)
