"""Which parents are not stored in the dtype that is written."""

from dataclasses import dataclass

import torch

from .plans import UpcyclePlan


@dataclass(frozen=True)
class Cast:
    """One dtype of one parent that is not the written one.

    Attributes:
        parent: The parent's role.
        source: What some of its tensors are stored in.
        target: What they are written in.
        is_exact: Whether no digit is lost.
    """

    parent: str
    source: str
    target: str
    is_exact: bool


def find_casts(plan: UpcyclePlan) -> list[Cast]:
    """Every cast of floating-point tensors, by parent and dtype."""
    target = str(plan.dtype).removeprefix("torch.")
    casts = []
    for role, dense in plan.dense.items():
        for dtype in sorted({dense.dtype(name) for name in dense.names} - {plan.dtype}, key=str):
            if dtype.is_floating_point:
                is_exact = torch.promote_types(dtype, plan.dtype) == plan.dtype
                casts.append(Cast(role, str(dtype).removeprefix("torch."), target, is_exact))
    return casts
