"""Paths: one for each token and each expert that it was sent to. Kernels take them in groups of one expert.

Invariant: a group is the rows of one expert, cut where they are many; where rows are rounded up, the rows added are
repeats with weight zero, so that they add nothing to any sum. Half precision on a CPU needs the rounding: oneDNN
builds a new kernel for each number of rows that it has not seen (torch 2.13).

Shapes: T tokens, K experts per token, S = T K paths (path t K + k is token t's k-th), E experts, r rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# In half precision on a CPU: up to how many rows a group is rounded up to a multiple of how many. Finer for few, so
# that little is added; coarser for many, so that there are few numbers in all.
ROUNDING = ((64, 16), (256, 32))
COARSEST = 64


@dataclass(frozen=True)
class PathGroup:
    """Some paths of one expert.

    Attributes:
        expert: which.
        paths: their numbers, (rows,).
        tokens: their tokens, (rows,).
        num_real: how many of them are no repeats; those come first.
    """

    expert: int
    paths: Tensor
    tokens: Tensor
    num_real: int

    def weights(self, weight_S: Tensor) -> Tensor:
        """The group's column of weights, (rows, 1); zero for repeats."""
        weight = weight_S.index_select(0, self.paths)
        if self.num_real < len(weight):
            weight[self.num_real :] = 0
        return weight[:, None]


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

    def groups(self, dtype: torch.dtype, most_rows: int | None = None) -> list[PathGroup]:
        """The paths of each expert that has any, in groups.

        Args:
            dtype: what is computed in.
            most_rows: where an expert's rows are cut; None takes all of them at once.
        """
        num_picked = self.expert_TK.shape[1]
        is_rounded = self.expert_TK.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
        order = torch.sort(self.expert_TK.reshape(-1), stable=True).indices
        counts = torch.bincount(self.expert_TK.reshape(-1), minlength=self.num_experts).tolist()
        groups, start = [], 0
        for expert, count in enumerate(counts):
            for first in range(start, start + count, most_rows or max(count, 1)):
                paths = order[first : min(first + (most_rows or count), start + count)]
                num_real = len(paths)
                if is_rounded:
                    paths = F.pad(paths, (0, -num_real % row_step(num_real)))
                groups.append(PathGroup(expert, paths, paths // num_picked, num_real))
            start += count
        return groups


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
            made = source.index_select(0, group.tokens) @ weight[group.expert].T
            out[group.paths[: group.num_real]] = made[: group.num_real]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        source, weight = ctx.saved_tensors
        d_source = torch.zeros_like(source) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for group in ctx.groups:
            rows = gradient.index_select(0, group.paths)
            rows[group.num_real :] = 0
            if d_source is not None:
                d_source.index_add_(0, group.tokens, rows @ weight[group.expert])
            if d_weight is not None:
                d_weight[group.expert].addmm_(rows.T, source.index_select(0, group.tokens))
        return d_source, d_weight, None, None


class _Summed(torch.autograd.Function):
    """`out[t] = sum over t's paths s of weight[expert of s] @ source[s]`, from (S, in) to (T, out)."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, weight: Tensor, groups: list[PathGroup], num_tokens: int) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.groups = groups
        out = source.new_zeros(num_tokens, weight.shape[1])
        for group in groups:
            rows = source.index_select(0, group.paths)
            rows[group.num_real :] = 0
            out.index_add_(0, group.tokens, rows @ weight[group.expert].T)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        source, weight = ctx.saved_tensors
        d_source = torch.zeros_like(source) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for group in ctx.groups:
            rows = gradient.index_select(0, group.tokens)
            rows[group.num_real :] = 0
            if d_source is not None:
                d_source[group.paths[: group.num_real]] = (rows @ weight[group.expert])[: group.num_real]
            if d_weight is not None:
                d_weight[group.expert].addmm_(rows.T, source.index_select(0, group.paths))
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
