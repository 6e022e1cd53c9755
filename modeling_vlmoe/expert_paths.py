"""Paths: one for each token and each expert that it was sent to. Kernels take them in groups.

Invariant: a group is a run of the paths sorted by expert, of one expert or of several, cut where it is long. Where an
expert's rows are rounded up, the rows added are repeats with weight zero, so that they add nothing to any sum. Half
precision on a CPU needs that: oneDNN builds a new kernel for each number of rows that it has not seen (torch 2.13).

Shapes: T tokens, K experts per token, S = T K paths (path t K + k is token t's k-th), E experts, r rank.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hollow_tensors import is_hollow

# In half precision on a CPU: up to how many rows a group is rounded up to a multiple of how many. Finer for few, so
# that little is added; coarser for many, so that there are few numbers in all.
ROUNDING = ((64, 16), (256, 32))
COARSEST = 64


@dataclass(frozen=True)
class PathGroup:
    """Paths of some experts that follow one another, sorted by expert.

    Attributes:
        experts: which.
        paths: their numbers, (rows,).
        tokens: their tokens, (rows,).
        ends: where each expert's rows end, (experts,), as `grouped_mm` takes it; None for one expert.
        is_real: which rows are no repeats, (rows,); None where all are.
    """

    experts: range
    paths: Tensor
    tokens: Tensor
    ends: Tensor | None = None
    is_real: Tensor | None = None

    def weights(self, weight_S: Tensor) -> Tensor:
        """The group's column of weights, (rows, 1); zero for repeats."""
        weight = weight_S.index_select(0, self.paths)
        return (weight if self.is_real is None else weight * self.is_real)[:, None]

    def zero_repeats(self, rows: Tensor) -> Tensor:
        """Rows, (rows, width), that are to be added to a sum; changed in place."""
        return rows if self.is_real is None else rows.mul_(self.is_real[:, None])

    def put(self, target_S: Tensor, rows: Tensor) -> None:
        """Writes each path's row, of (rows, ...), to its place in (S, ...)."""
        if self.is_real is None:
            target_S[self.paths] = rows
        else:
            target_S[self.paths[self.is_real]] = rows[self.is_real]

    def own(self, stack: Tensor) -> Tensor:
        """The experts' own of a stack, (E, ...): (experts, ...), or of one expert (...)."""
        return stack[self.experts[0]] if self.ends is None else stack[self.experts.start : self.experts.stop]

    def product(self, rows: Tensor, own: Tensor) -> Tensor:
        """Each row, of (rows, I), times its expert's matrix (I, O): (rows, O)."""
        return rows @ own if self.ends is None else F.grouped_mm(rows, own, offs=self.ends)

    def add_product(self, total: Tensor, rows: Tensor, own: Tensor) -> None:
        """Adds that to (rows, O), in place."""
        if self.ends is None:
            total.addmm_(rows, own)
        else:
            total.add_(self.product(rows, own))

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds each expert's `left.T @ right`, of rows (rows, O) and (rows, I), to (E, O, I), in place."""
        if self.ends is None:
            self.own(total).addmm_(left.T, right)
        else:
            self.own(total).add_(F.grouped_mm(left.T, right, offs=self.ends))

    def add_to_rows(self, rows: Tensor, vectors: Tensor) -> None:
        """Adds each row's expert's vector, of (E, width), to (rows, width), in place."""
        rows.add_(self.own(vectors) if self.ends is None else vectors.index_select(0, self._expert_of_row()))

    def add_sum(self, total: Tensor, rows: Tensor) -> None:
        """Adds the sum of each expert's rows, (rows, width), to (E, width), in place."""
        if self.ends is None:
            self.own(total).add_(rows.sum(0))
        else:
            total.index_add_(0, self._expert_of_row(), rows)

    def _expert_of_row(self) -> Tensor:
        assert self.ends is not None
        row = torch.arange(len(self.paths), dtype=self.ends.dtype, device=self.ends.device)
        return torch.searchsorted(self.ends, row, right=True) + self.experts.start


@dataclass(frozen=True)
class Paths:
    """Where tokens are sent.

    Args:
        expert_TK: the chosen experts, (T, K).
        num_experts: E.
    """

    expert_TK: Tensor
    num_experts: int

    @property
    def shape(self) -> tuple[int, int]:
        num_tokens, num_picked = self.expert_TK.shape
        return num_tokens, num_picked

    def groups(self, dtype: torch.dtype, most_rows: int | None = None, are_joined: bool = False) -> list[PathGroup]:
        """The paths of each expert that has any, in groups.

        Args:
            dtype: what is computed in.
            most_rows: of a group; None takes all of an expert's at once.
            are_joined: whether several experts may share a group.
        """
        num_picked = self.expert_TK.shape[1]
        is_rounded = self.expert_TK.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
        order = torch.sort(self.expert_TK.reshape(-1), stable=True).indices
        counts, groups, start = count_paths(self.expert_TK, self.num_experts), [], 0
        if is_hollow(self.expert_TK) and most_rows is not None:  # of groups that are cut the largest stands for all
            counts = [min(self.expert_TK.numel() if are_joined else len(self.expert_TK), most_rows)]
        elif are_joined and most_rows is not None and not is_rounded:
            return list(self._joined(order, list(accumulate(counts)), most_rows))
        for expert, count in enumerate(counts):
            for first in range(start, start + count, most_rows or max(count, 1)):
                paths = order[first : min(first + (most_rows or count), start + count)]
                is_real = None
                if is_rounded and (more := -len(paths) % row_step(len(paths))):
                    is_real = torch.arange(len(paths) + more, device=paths.device) < len(paths)
                    paths = F.pad(paths, (0, more))
                groups.append(PathGroup(range(expert, expert + 1), paths, paths // num_picked, None, is_real))
            start += count
        return groups

    def _joined(self, order: Tensor, ends: list[int], most_rows: int) -> Iterator[PathGroup]:
        """Groups of the paths in this order, whose experts' paths end there."""
        for first in range(0, len(order), most_rows):
            paths = order[first : first + most_rows]
            experts = range(bisect_right(ends, first), bisect_left(ends, first + len(paths)) + 1)
            own = [min(ends[expert] - first, len(paths)) for expert in experts]
            own_ends = torch.tensor(own, dtype=torch.int32, device=order.device) if len(own) > 1 else None
            yield PathGroup(experts, paths, paths // self.expert_TK.shape[1], own_ends)


def count_paths(expert_TK: Tensor, num_experts: int) -> list[int]:
    """How many paths each expert has, of chosen experts (T, K); all have as many where the choice has no numbers."""
    if is_hollow(expert_TK):
        each, more = divmod(expert_TK.numel(), num_experts)
        return [each + (expert < more) for expert in range(num_experts)]
    return torch.bincount(expert_TK.reshape(-1), minlength=num_experts).tolist()


def row_step(num_rows: int) -> int:
    """What a number of rows is rounded up to a multiple of."""
    return next((step for most, step in ROUNDING if num_rows <= most), COARSEST)


class _Gathered(torch.autograd.Function):
    """`out[s] = weight[expert of s] @ source[token of s]`, from (T, in) to (S, out), with `weight` (E, out, in)."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, weight: Tensor, groups: list[PathGroup], num_paths: int) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.groups = groups
        out = source.new_zeros(num_paths, weight.shape[1])
        for group in groups:
            group.put(out, group.product(source.index_select(0, group.tokens), group.own(weight).mT))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        source, weight = ctx.saved_tensors
        d_source = torch.zeros_like(source) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for group in ctx.groups:
            rows = group.zero_repeats(gradient.index_select(0, group.paths))
            if d_source is not None:
                d_source.index_add_(0, group.tokens, group.product(rows, group.own(weight)))
            if d_weight is not None:
                group.add_outer(d_weight, rows, source.index_select(0, group.tokens))
        return d_source, d_weight, None, None


class _Summed(torch.autograd.Function):
    """`out[t] = sum over t's paths s of weight[expert of s] @ source[s]`, from (S, in) to (T, out)."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, weight: Tensor, groups: list[PathGroup], num_tokens: int) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.groups = groups
        out = source.new_zeros(num_tokens, weight.shape[1])
        for group in groups:
            rows = group.zero_repeats(source.index_select(0, group.paths))
            out.index_add_(0, group.tokens, group.product(rows, group.own(weight).mT))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        source, weight = ctx.saved_tensors
        d_source = torch.zeros_like(source) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for group in ctx.groups:
            rows = group.zero_repeats(gradient.index_select(0, group.tokens))
            if d_source is not None:
                group.put(d_source, group.product(rows, group.own(weight)))
            if d_weight is not None:
                group.add_outer(d_weight, rows, source.index_select(0, group.paths))
        return d_source, d_weight, None, None


def gather_product(source_TI: Tensor, weight_EOI: Tensor, paths: Paths, groups: list[PathGroup] | None) -> Tensor:
    """Each path's expert's product with the path's token, (S, O).

    Args:
        source_TI: the tokens, (T, I).
        weight_EOI: the experts' weights, (E, O, I).
        paths: where tokens are sent.
        groups: the paths in groups, for one product per group; None for one product with all experts' weights, of
            which each path keeps its own block.
    """
    num_tokens, num_picked = paths.shape
    num_experts, num_rows, _ = weight_EOI.shape
    if groups is not None:
        return _Gathered.apply(source_TI, weight_EOI, groups, num_tokens * num_picked)
    blocks_TER = F.linear(source_TI, weight_EOI.flatten(0, 1)).view(num_tokens, num_experts, num_rows)
    chosen = paths.expert_TK[..., None].expand(-1, -1, num_rows)
    return blocks_TER.gather(1, chosen).flatten(0, 1)


def sum_product(source_SI: Tensor, weight_EOI: Tensor, paths: Paths, groups: list[PathGroup] | None) -> Tensor:
    """The sum of the products of each token's paths with their experts' weights, (T, O).

    Args:
        source_SI: one row per path, (S, I).
        weight_EOI: the experts' weights, (E, O, I).
        paths: where tokens are sent.
        groups: as of `gather_product`; with None the paths' rows are laid out in blocks, zero where a token does not
            go.
    """
    num_tokens, num_picked = paths.shape
    num_experts, _, width = weight_EOI.shape
    if groups is not None:
        return _Summed.apply(source_SI, weight_EOI, groups, num_tokens)
    blocks = source_SI.new_zeros(num_tokens, num_experts, width)
    chosen = paths.expert_TK[..., None].expand(-1, -1, width)
    blocks = blocks.scatter_add(1, chosen, source_SI.view(num_tokens, num_picked, width))
    return F.linear(blocks.flatten(1), weight_EOI.permute(1, 0, 2).flatten(1))
