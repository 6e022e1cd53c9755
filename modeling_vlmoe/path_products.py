"""Products of paths with their experts' matrices, from tokens and back to them.

Shapes: T tokens, K experts per token, S = T K paths, E experts, I and O widths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_paths import PathGroup, Paths, without_autocast
from .expert_sums import OuterSums, widened
from .stack_layout import laid_as, laid_out


def _to_paths(rows_TI: Tensor, own: Tensor, groups: list[PathGroup], num_paths: int) -> Tensor:
    """Each path's expert's matrix, of (E, I, O), times its token's row: (S, O)."""
    out = rows_TI.new_zeros(num_paths, own.shape[2])
    for group in groups:
        group.put(out, group.product(rows_TI.index_select(0, group.tokens), group.own(own)))
    return out


def _to_tokens(rows_SI: Tensor, own: Tensor, groups: list[PathGroup], num_tokens: int) -> Tensor:
    """The sum of that over a token's paths, of a row per path: (T, O)."""
    out = rows_SI.new_zeros(num_tokens, own.shape[2], dtype=widened(rows_SI.dtype, len(rows_SI) // max(1, num_tokens)))
    for group in groups:
        rows = group.zero_repeats(rows_SI.index_select(0, group.paths))
        out.index_add_(0, group.tokens, group.product(rows, group.own(own)).to(out.dtype))
    return out.to(rows_SI.dtype)


class _Product(torch.autograd.Function):
    """`_to_paths`, or summed `_to_tokens`, of weights (E, O, I): each takes the other for its gradient."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, source: Tensor, weight: Tensor, groups: list[PathGroup], num_rows: int, is_summed: bool
    ) -> Tensor:
        ctx.save_for_backward(source, weight)
        ctx.groups, ctx.is_summed = groups, is_summed
        return (_to_tokens if is_summed else _to_paths)(source, laid_out(weight).mT, groups, num_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        source, weight = ctx.saved_tensors
        d_source = d_weight = None
        if ctx.needs_input_grad[0]:
            move = _to_paths if ctx.is_summed else _to_tokens
            d_source = move(gradient, laid_out(weight), ctx.groups, len(source))
        if ctx.needs_input_grad[1]:
            sums = OuterSums(weight, ctx.groups)
            for group in ctx.groups:
                of_gradient, of_source = group.paths, group.tokens
                if ctx.is_summed:
                    of_gradient, of_source = of_source, of_gradient
                rows = group.zero_repeats(gradient.index_select(0, of_gradient))
                sums.add(group, rows, source.index_select(0, of_source))
            d_weight = laid_as(sums.result(), weight)
        return d_source, d_weight, None, None, None


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
        return _Product.apply(source_TI, weight_EOI, groups, num_tokens * num_picked, False)
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
        return _Product.apply(source_SI, weight_EOI, groups, num_tokens, True)
    blocks = source_SI.new_zeros(num_tokens, num_experts, width)
    chosen = paths.expert_TK[..., None].expand(-1, -1, width)
    blocks = blocks.scatter_add(1, chosen, source_SI.view(num_tokens, num_picked, width))
    return F.linear(blocks.flatten(1), weight_EOI.permute(1, 0, 2).flatten(1))
