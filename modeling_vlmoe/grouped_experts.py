"""Experts with weights of their own, those with few paths several at once, and where they have them low-rank pairs
beside their weights, which are never added to the weights.

Two users: half precision on a CPU, where the rows of each expert have to be rounded up (see expert_paths.py), and LoRA
on experts (see routed_lora.py).

Invariant: of what is as large as (paths, R) one tensor is kept for backward, what goes into the activation; gradients
of weights are made for those that are trained, once.

Shapes: T tokens, D model width, O output width, F expert width, R = 2F (gated) or F, E experts, K experts per token,
    S = T K paths, r rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_maths import Autocast, ExpertMaths
from .expert_paths import (
    PathGroup,
    Paths,
    block_rows,
    can_join,
    without_autocast,
)
from .expert_sums import OuterSums, widened
from .path_products import gather_product
from .shared_base import LowRank, kept, mask_generator
from .stack_layout import laid_as, laid_out


@dataclass(frozen=True)
class FullExperts:
    """What experts are made of.

    Attributes:
        maths: activation and what goes with it.
        up: their first weights, (E, R, D).
        down: their second, (E, O, F).
        up_bias: (E, R).
        down_bias: (E, O).
        up_pair: what is added to `up`; None for nothing.
        down_pair: what is added to `down`.
        dropout: probability of dropout before each pair's `a`.
    """

    maths: ExpertMaths
    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    up_pair: LowRank | None = None
    down_pair: LowRank | None = None
    dropout: float = 0.0

    def can_join(self) -> bool:
        """Whether experts with few paths may be computed together."""
        pairs = [pair for pair in (self.up_pair, self.down_pair) if pair is not None]
        widths = [*self.up.shape[1:], *self.down.shape[1:], *(width for pair in pairs for width in pair.widths)]
        return can_join(self.up.dtype, self.up.device, widths)


class _Grouped(torch.autograd.Function):
    """From tokens (T, D) and the paths' low-rank terms to the weighted sum of the experts' results, (T, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        maths: ExpertMaths,
        groups: list[PathGroup],
        dropout: tuple[float, int],
        x_TD: Tensor,
        weight_S: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        low_Sr: Tensor | None,
        b_up: Tensor | None,
        a_down: Tensor | None,
        b_down: Tensor | None,
        scale: float,
        *shared: Tensor,
    ) -> Tensor:
        wide = widened(torch.promote_types(x_TD.dtype, weight_S.dtype), len(weight_S) // max(1, len(x_TD)))
        out_TO = x_TD.new_zeros(len(x_TD), down.shape[1], dtype=wide)
        generator = mask_generator(dropout, x_TD.device)
        kept_rows = []
        given = (x_TD, weight_S, up, down, up_bias, down_bias, low_Sr, b_up, a_down, b_down)
        b_up, b_down = laid_out(b_up), laid_out(b_down)
        for group in groups:
            rows = group.product(x_TD.index_select(0, group.tokens), group.own(up).mT)
            if low_Sr is not None and b_up is not None:
                group.add_product(rows, low_Sr.index_select(0, group.paths), group.own(b_up).mT)
            if up_bias is not None:
                group.add_to_rows(rows, up_bias)
            hidden = maths.activate(rows)
            made = group.product(hidden, group.own(down).mT)
            if a_down is not None and b_down is not None:
                seen = hidden if generator is None else hidden * kept(hidden.shape, dropout[0], generator, hidden)
                low_down = group.product(seen, group.own(a_down).mT).mul_(scale)
                group.add_product(made, low_down, group.own(b_down).mT)
            if down_bias is not None:
                group.add_to_rows(made, down_bias)
            out_TO.index_add_(0, group.tokens, (made * group.weights(weight_S)).to(wide))
            kept_rows.append(rows)
        ctx.maths, ctx.groups, ctx.dropout, ctx.scale = maths, groups, dropout, scale
        ctx.save_for_backward(*given, *kept_rows)
        return out_TO.to(x_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor) -> tuple:
        x_TD, weight_S, up, down, up_bias, down_bias, low_Sr, b_up, a_down, b_down, *all_rows = ctx.saved_tensors
        maths, generator = ctx.maths, mask_generator(ctx.dropout, x_TD.device)
        given_b_up, given_b_down = b_up, b_down
        b_up, b_down = laid_out(b_up), laid_out(b_down)
        wide = widened(x_TD.dtype, len(weight_S) // max(1, len(x_TD)))
        wanted = ctx.needs_input_grad[3:]
        d_x = x_TD.new_zeros(x_TD.shape, dtype=wide) if wanted[0] else None
        d_weight = torch.zeros_like(weight_S)
        # Of weights only those of experts that have rows are written, so none may hold what memory held.
        d_up, d_down, d_up_bias, d_down_bias, d_low = made = [
            torch.zeros_like(one) if one is not None and is_wanted else None
            for one, is_wanted in zip((up, down, up_bias, down_bias, low_Sr), wanted[2:7], strict=True)
        ]
        d_b_up, d_a_down, d_b_down = pairs = [
            OuterSums(one, ctx.groups) if one is not None and is_wanted else None
            for one, is_wanted in zip((b_up, a_down, b_down), wanted[7:10], strict=True)
        ]
        shared = maths.shared_parameters()
        d_shared = [torch.zeros_like(one) if one.requires_grad else None for one in shared]
        for group, rows in zip(ctx.groups, all_rows, strict=True):
            weight = group.weights(weight_S)
            replay = maths.replay(rows, Autocast.off(rows.device))
            value = replay.hidden.detach()
            d_made = d_out.index_select(0, group.tokens)
            d_hidden = group.product(d_made, group.own(down))
            weighted = (d_made * weight).to(d_made.dtype)
            if a_down is not None and b_down is not None:
                mask = None if generator is None else kept(value.shape, ctx.dropout[0], generator, value)
                seen = value if mask is None else value * mask
                d_low_down = group.product(d_made, group.own(b_down)).mul_(ctx.scale)
                if mask is None:
                    group.add_product(d_hidden, d_low_down, group.own(a_down))
                else:
                    d_hidden.add_(group.product(d_low_down, group.own(a_down)).mul_(mask))
                if d_a_down is not None:
                    d_a_down.add(group, (d_low_down * weight).to(value.dtype), seen)
                if d_b_down is not None:
                    low_down = group.product(seen, group.own(a_down).mT).mul_(ctx.scale)
                    d_b_down.add(group, weighted, low_down)
            by_weight = (value * d_hidden).sum(-1, dtype=d_weight.dtype)
            if down_bias is not None:
                biases = torch.zeros_like(d_made)
                group.add_to_rows(biases, down_bias)
                by_weight += (d_made * biases).sum(-1, dtype=by_weight.dtype)
            group.put(d_weight, by_weight)
            if d_down is not None:
                group.add_large_outer(d_down, weighted, value)
            if d_down_bias is not None:
                group.add_sum(d_down_bias, weighted)
            d_hidden.mul_(weight)
            d_rows, found = replay.backward(d_hidden, shared)
            if d_x is not None:
                d_x.index_add_(0, group.tokens, group.product(d_rows, group.own(up)).to(wide))
            if d_up is not None:
                group.add_large_outer(d_up, d_rows, x_TD.index_select(0, group.tokens))
            if d_up_bias is not None:
                group.add_sum(d_up_bias, d_rows)
            if d_low is not None and b_up is not None:
                group.put(d_low, group.product(d_rows, group.own(b_up)))
            if d_b_up is not None:
                d_b_up.add(group, d_rows, low_Sr.index_select(0, group.paths))
            for total, one in zip(d_shared, found, strict=True):
                if total is not None and one is not None:
                    total += one
        like = (given_b_up, None, given_b_down)
        made += [None if one is None else laid_as(one.result(), other) for one, other in zip(pairs, like, strict=True)]
        return None, None, None, None if d_x is None else d_x.to(x_TD.dtype), d_weight, *made, None, *d_shared


def full_experts(experts: Any, **pairs: Any) -> FullExperts:
    """An `Experts` as `run_grouped` takes it."""
    name = experts.input_stack
    up_bias, down_bias = (getattr(experts, f"{one}_bias", None) for one in (name, "down_proj"))
    return FullExperts(experts, getattr(experts, name), experts.down_proj, up_bias, down_bias, **pairs)


def run_grouped(full: FullExperts, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What the experts make of tokens, in the weights' dtype whatever autocast says, as the host's grouped kernel.

    Args:
        full: the experts.
        x_TD: (T, D).
        expert_TK: the chosen experts, (T, K).
        weight_TK: their weights, (T, K).

    Returns:
        (T, O), in the tokens' dtype.
    """
    with torch.autocast(device_type=x_TD.device.type, enabled=False):
        paths, x = Paths(expert_TK, len(full.up)), x_TD.to(full.up.dtype)
        groups = paths.groups(x.dtype, block_rows(full.up.shape[1], x.dtype), full.can_join(), are_cut=False)
        low_Sr = None
        if full.up_pair is not None:
            seen = F.dropout(x, full.dropout) if full.dropout else x
            low_Sr = gather_product(seen, full.up_pair.a, paths, None if full.up_pair.is_stacked(x.dtype) else groups)
            low_Sr = low_Sr * full.up_pair.scale
        up_pair, down_pair = full.up_pair, full.down_pair
        out = _Grouped.apply(
            full.maths,
            groups,
            (full.dropout, int(torch.randint(2**62, ())) if full.dropout else 0),
            x,
            weight_TK.reshape(-1),
            full.up,
            full.down,
            full.up_bias,
            full.down_bias,
            low_Sr,
            None if up_pair is None else up_pair.b,
            None if down_pair is None else down_pair.a,
            None if down_pair is None else down_pair.b,
            1.0 if down_pair is None else down_pair.scale,
            *full.maths.shared_parameters(),
        )
    return out.to(x_TD.dtype)
