"""Sums over paths: in what they are held, and those that experts have of their own.

Shapes: T tokens, E experts, D, O, I widths.
"""

from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_paths import PathGroup

# A sum of so many numbers is rounded once in any dtype.
ROUNDED_ONCE = 2


def widened(dtype: torch.dtype, num_terms: int = ROUNDED_ONCE + 1) -> torch.dtype:
    """What sums of so many numbers of a dtype are held in: float32 for half precision, if they are more than two.

    Args:
        dtype: of the numbers that are added, before they are rounded to anything.
        num_terms: how many.
    """
    return dtype if num_terms <= ROUNDED_ONCE else torch.promote_types(dtype, torch.float32)


class OuterSums:
    """Of each expert the sum of `left.T @ right` over its groups of paths: (E, O, I).

    An expert's first group writes, so that memory is touched once; one without paths is zero.

    Args:
        like: (E, O, I), of the dtype in which the sums are wanted.
        groups: all groups there are, each of which is to be added once, in order.
    """

    def __init__(self, like: Tensor, groups: list[PathGroup]):
        num_groups = Counter(expert for group in groups for expert in group.experts)
        self.total = like.new_empty(like.shape, dtype=widened(like.dtype, max(num_groups.values(), default=0)))
        self._dtype = like.dtype
        self._last: int | None = None
        if idle := [expert for expert in range(len(like)) if expert not in num_groups]:
            self.total[idle] = 0

    def add(self, group: PathGroup, left: Tensor, right: Tensor) -> None:
        """Adds a group's rows, (rows, O) and (rows, I)."""
        own, is_begun = group.own(self.total), group.experts[0] == self._last
        self._last = group.experts[-1]
        if group.ends is not None:
            made = F.grouped_mm(left.T, right, offs=group.ends)
            for expert, (start, end) in enumerate(pairwise((0, *group.bounds))):
                if start == end:  # of no rows a GPU's kernel may make anything (torch 2.9 to 2.13)
                    made[expert] = 0
            if is_begun:
                made[0] += own[0]
            own.copy_(made)
        elif own.dtype != left.dtype:
            made = left.T @ right
            own.copy_(made + own if is_begun else made)
        elif is_begun:
            own.addmm_(left.T, right)
        else:
            torch.mm(left.T, right, out=own)

    def result(self) -> Tensor:
        """The sums, in the dtype wanted."""
        return self.total.to(self._dtype)
