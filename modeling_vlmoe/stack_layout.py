"""Stacks of matrices, one per expert, in the two layouts that they come in: ours, (E, O, I) in memory, and PEFT's `b`,
which is a view of (O, I, E): `grouped_mm` does not take it.

Memory that was never touched is what such stacks cost most (CPU): so a cast and a new layout are one step.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given", Tensor, Tensor | None)

# A CPU lays out a stack in slices of about so many numbers, which its cache holds.
SLICE_NUMBERS = 2**17
FEW_EXPERTS = 16  # up to here permuting a stack of matrices into another layout is the quicker way (torch 2.13, CPU)


def _written(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack, (E, O, I), in a dtype, its matrices one after the other in memory."""
    num_rows = max(1, SLICE_NUMBERS // (len(stack) * stack.shape[2]))
    if stack.device.type != "cpu" or stack.is_contiguous() or num_rows >= stack.shape[1]:
        return stack.to(dtype).contiguous()
    out = torch.empty(stack.shape, dtype=dtype, device=stack.device)
    for into, some in zip(out.split(num_rows, 1), stack.split(num_rows, 1), strict=True):
        into.copy_(some.to(dtype))
    return out


def laid_out(stack: Given) -> Given:
    """A stack of matrices, (E, O, I), one after the other in memory, for one pass alone: to keep a copy for backward
    would be to keep another adapter.
    """
    return None if stack is None else _written(stack, stack.dtype)


def laid_as(stack: Given, other: Given) -> Given:
    """A stack of matrices that lie one after the other, laid out in memory as another, and of its dtype."""
    if stack is None or other is None:
        return stack
    if other.is_contiguous() or not other.movedim(0, -1).is_contiguous():
        return stack.to(other.dtype)
    if len(stack) <= FEW_EXPERTS:
        return stack.permute(1, 2, 0).to(other.dtype).contiguous().movedim(-1, 0)
    flat = stack.flatten(1).t()
    if stack.dtype == other.dtype or stack.device.type != "cpu":
        laid = flat.contiguous().to(other.dtype)
    else:
        laid = torch.empty(flat.shape, dtype=other.dtype, device=stack.device)
        num_rows = max(1, SLICE_NUMBERS // len(stack))
        for into, some in zip(laid.split(num_rows), flat.split(num_rows), strict=True):
            into.copy_(some.contiguous())
    return laid.view(*stack.shape[1:], -1).movedim(-1, 0)


class _Cast(torch.autograd.Function):
    """A stack in another dtype, its matrices one after the other."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(stack)
        return _written(stack, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (stack,) = ctx.saved_tensors
        return laid_as(gradient.contiguous(), stack), None


def cast_stack(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack, (E, O, I), in a dtype; where that is another one it is a copy, and laid out while it is made."""
    return stack if stack.dtype == dtype else _Cast.apply(stack, dtype)
