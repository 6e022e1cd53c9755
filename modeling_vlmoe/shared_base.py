"""Experts that are one dense MLP and, each, products of low rank beside its weights, at about the dense MLP's price.

Expert e computes, with s for what the pairs may be scaled by and `act` for all that an MLP does in between:

    y = (W_down + B_down[e] A_down[e]) act((W_up + B_up[e] A_up[e]) x + bias_up[e]) + bias_down[e]

The products with the W are the same for every expert. So `W_up x` is computed once per token; each path (a token and
an expert it was sent to) adds its own product of low rank before its activation; and as what follows is linear, the
weighted sum over a token's paths is taken before one product with `W_down`. (DeRS, 2503.01359, has such experts; this
order of computing them is ours.)

Invariant: of what has the size (paths, F) no more than one block is kept, and nothing of the size of a weight is made
per expert. Paths go through their activation a block at a time, forward, and again in backward from `W_up x`, unless
one block was all.

Shapes: T tokens, D model width, O output width, F expert width, R = 2F (gated) or F, E experts, K experts per token,
    S = T K paths, r rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .expert_maths import Autocast, ExpertMaths
from .expert_paths import (
    HALF,
    PathGroup,
    Paths,
    block_rows,
    can_join,
    without_autocast,
)
from .expert_sums import OuterSums, widened
from .hollow_tensors import device_type
from .path_products import gather_product, sum_product
from .stack_layout import laid_as, laid_out

# Up to E r of this, one product with all experts' low-rank weights costs less than one product for each of them. In
# half precision on a CPU large products are faster, and small ones are not.
MOST_STACKED = 256
HALF_FACTOR = 4


@dataclass(frozen=True)
class LowRank:
    """One pair per expert, that is added to a weight (O, I) as `scale * b @ a`.

    Attributes:
        a: (E, r, I).
        b: (E, O, r).
        scale: a number.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0

    def is_stacked(self, dtype: torch.dtype) -> bool:
        """Whether one product with all experts' weights, in a dtype, and a mask, is the cheaper form."""
        factor = HALF_FACTOR if dtype in HALF and device_type(self.a) == "cpu" else 1
        return self.a.shape[0] * self.a.shape[1] <= MOST_STACKED * factor

    @property
    def widths(self) -> tuple[int, ...]:
        """r, I and O."""
        return *self.a.shape[1:], self.b.shape[1]

    def to(self, dtype: torch.dtype) -> "LowRank":
        return LowRank(self.a.to(dtype), self.b.to(dtype), self.scale)


@dataclass(frozen=True)
class SharedBase:
    """What experts are made of.

    Attributes:
        maths: activation and what goes with it.
        num_experts: E.
        up: the base's first weight, (R, D).
        down: its second, (O, F).
        up_pair: what is added to `up`; None for nothing.
        down_pair: what is added to `down`.
        up_bias: the experts' own, (E, R).
        down_bias: the experts' own, (E, O).
        dropout: probability of dropout before each pair's `a`, as LoRA has it.
    """

    maths: ExpertMaths
    num_experts: int
    up: Tensor
    down: Tensor
    up_pair: LowRank | None
    down_pair: LowRank | None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    dropout: float = 0.0

    def can_join(self, dtype: torch.dtype) -> bool:
        """Whether the pairs of several experts may be multiplied together, in a dtype."""
        pairs = [pair for pair in (self.up_pair, self.down_pair) if pair is not None]
        return can_join(dtype, self.up.device, [width for pair in pairs for width in pair.widths])


def mask_generator(dropout: tuple[float, int], device: torch.device) -> torch.Generator | None:
    """Draws dropout's masks, by its seed: the same ones forward and backward; None without dropout."""
    return torch.Generator(device).manual_seed(dropout[1]) if dropout[0] else None


def kept(shape: torch.Size, dropout: float, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Dropout's mask, scaled."""
    mask = torch.empty(shape, device=like.device).bernoulli_(1 - dropout, generator=generator)
    return mask.div_(1 - dropout).to(like.dtype)


class _Activated(torch.autograd.Function):
    """From `W_up x` (T, R) and the paths' own low-rank terms to the weighted sum of activations, (T, F), and what the
    paths' `a_down` makes of them, (S, r), weighted too.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        maths: ExpertMaths,
        autocast: Autocast,
        groups: list[PathGroup],
        dropout: tuple[float, int],
        base_TR: Tensor,
        low_Sr: Tensor | None,
        weight_S: Tensor,
        b_up: Tensor | None,
        a_down: Tensor | None,
        bias_ER: Tensor | None,
        *shared: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.maths, ctx.autocast, ctx.groups, ctx.dropout = maths, autocast, groups, dropout
        given, all_rows = (base_TR, low_Sr, weight_S, b_up, a_down, bias_ER), []
        wide = widened(torch.promote_types(base_TR.dtype, weight_S.dtype), len(weight_S) // max(1, len(base_TR)))
        sum_TF = base_TR.new_zeros(len(base_TR), maths.intermediate_size, dtype=wide)
        low_down = None if a_down is None else base_TR.new_zeros(len(weight_S), a_down.shape[1])
        generator = mask_generator(dropout, base_TR.device)
        b_up = laid_out(b_up)
        for group in groups:
            weight = group.weights(weight_S)
            rows = _before_activation(group, base_TR, low_Sr, b_up, bias_ER)
            hidden = maths.activate_as(rows, autocast)
            if len(groups) == 1:
                all_rows.append(rows)
            sum_TF.index_add_(0, group.tokens, (hidden * weight).to(wide))
            if a_down is not None and low_down is not None:
                seen = hidden
                if dropout[0]:
                    seen = hidden * kept(hidden.shape, dropout[0], generator, hidden)
                made = group.product(seen, group.own(a_down).mT) * weight
                group.put(low_down, made.to(low_down.dtype))
        ctx.save_for_backward(*given, *all_rows)
        return sum_TF.to(base_TR.dtype), low_down

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx: Any, d_sum: Tensor, d_low_down: Tensor | None) -> tuple:
        base_TR, low_Sr, weight_S, b_up, a_down, bias_ER, *all_rows = ctx.saved_tensors
        maths, dropout, generator = ctx.maths, ctx.dropout[0], mask_generator(ctx.dropout, d_sum.device)
        wide = widened(base_TR.dtype, len(weight_S) // max(1, len(base_TR)))
        given_b, b_up = b_up, laid_out(b_up)
        wanted = ctx.needs_input_grad[4:10]
        d_base = base_TR.new_zeros(base_TR.shape, dtype=wide) if wanted[0] else None
        d_low, d_weight, d_bias = (
            torch.zeros_like(one, dtype=widened(one.dtype)) if one is not None and is_wanted else None
            for one, is_wanted in ((low_Sr, wanted[1]), (weight_S, wanted[2]), (bias_ER, wanted[5]))
        )
        d_b, d_a = (
            OuterSums(one, ctx.groups) if one is not None and is_wanted else None
            for one, is_wanted in ((b_up, wanted[3]), (a_down, wanted[4]))
        )
        shared = maths.shared_parameters()
        d_shared = [torch.zeros_like(one) if one.requires_grad else None for one in shared]
        for group in ctx.groups:
            weight = group.weights(weight_S)
            rows = all_rows[0] if all_rows else _before_activation(group, base_TR, low_Sr, b_up, bias_ER)
            replay = maths.replay(rows, ctx.autocast)
            value = replay.hidden.detach()
            d_hidden = d_sum.index_select(0, group.tokens)
            if a_down is not None and d_low_down is not None:
                d_made = d_low_down.index_select(0, group.paths)
                own, value_seen = group.own(a_down), value
                if dropout:
                    mask = kept(value.shape, dropout, generator, value)
                    d_hidden.add_(group.product(d_made, own).mul_(mask))
                    value_seen = value * mask
                else:
                    group.add_product(d_hidden, d_made, own)
                if d_a is not None:
                    d_a.add(group, (d_made * weight).to(value.dtype), value_seen)
            if d_weight is not None:
                group.put(d_weight, (value * d_hidden).sum(-1, dtype=d_weight.dtype))
            d_hidden.mul_(weight)
            d_rows, found = replay.backward(d_hidden, shared)
            if d_base is not None:
                d_base.index_add_(0, group.tokens, d_rows.to(wide))
            if d_low is not None:
                group.put(d_low, group.product(d_rows, group.own(b_up)).to(d_low.dtype))
            if d_b is not None:
                d_b.add(group, d_rows, low_Sr.index_select(0, group.paths))
            if d_bias is not None:
                group.add_sum(d_bias, d_rows)
            for total, one in zip(d_shared, found, strict=True):
                if total is not None and one is not None:
                    total += one
        found = (
            _as(d_base, base_TR),
            _as(d_low, low_Sr),
            _as(d_weight, weight_S),
            None if d_b is None else laid_as(d_b.result(), given_b),
            None if d_a is None else d_a.result(),
            _as(d_bias, bias_ER),
        )
        return None, None, None, None, *found, *d_shared


def _as(total: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A sum in the dtype of what it is the gradient of."""
    return None if total is None or like is None else total.to(like.dtype)


def _before_activation(
    group: PathGroup, base_TR: Tensor, low_Sr: Tensor | None, b_up: Tensor | None, bias_ER: Tensor | None
) -> Tensor:
    """What a group's paths give to their activation, (rows, R), in memory of its own."""
    rows = base_TR.index_select(0, group.tokens)
    if low_Sr is not None and b_up is not None:
        group.add_product(rows, low_Sr.index_select(0, group.paths), group.own(b_up).mT)
    if bias_ER is not None:
        group.add_to_rows(rows, bias_ER)
    return rows


def _activated_masked(
    base: SharedBase, paths: Paths, base_TR: Tensor, low_Sr: Tensor | None, weight_TK: Tensor
) -> tuple[Tensor, Tensor | None]:
    """As `_Activated`, in shapes that do not depend on the choice: for compilers, and for devices that would have to
    wait for it. A token's k-th paths go together; each keeps its own expert's block of the products with all experts'.
    """
    num_tokens, num_picked = paths.shape
    total, made = base_TR.new_zeros(num_tokens, base.maths.intermediate_size, dtype=weight_TK.dtype), []
    low_TKr = None if low_Sr is None else low_Sr.unflatten(0, (num_tokens, num_picked))

    def one_slot(base_TR: Tensor, low_Tr: Tensor | None, weight_T: Tensor, expert_T: Tensor) -> tuple:
        rows = base_TR
        if low_Tr is not None and base.up_pair is not None:
            is_own = F.one_hot(expert_T, paths.num_experts).to(low_Tr.dtype)[..., None]
            stacked = base.up_pair.b.to(low_Tr.dtype).permute(1, 0, 2).flatten(1)
            rows = rows + F.linear((is_own * low_Tr[:, None]).flatten(1), stacked)
        if base.up_bias is not None:
            rows = rows + base.up_bias.to(rows.dtype)[expert_T]
        hidden = base.maths.activate(rows)
        low_down = None
        if base.down_pair is not None:
            pair = base.down_pair.to(hidden.dtype)
            blocks = F.linear(hidden, pair.a.flatten(0, 1)).unflatten(1, (paths.num_experts, pair.a.shape[1]))
            low_down = blocks.gather(1, expert_T[:, None, None].expand(-1, -1, blocks.shape[-1]))[:, 0]
            low_down = (low_down * weight_T[:, None]).to(hidden.dtype)
        return hidden * weight_T[:, None], low_down

    for pick in range(num_picked):
        low_Tr = None if low_TKr is None else low_TKr[:, pick]
        given = (base_TR, low_Tr, weight_TK[:, pick], paths.expert_TK[:, pick])
        is_trained = torch.is_grad_enabled() and base_TR.requires_grad and not torch.compiler.is_compiling()
        hidden, low_down = (
            checkpoint(one_slot, *given, use_reentrant=False, preserve_rng_state=False)
            if is_trained
            else one_slot(*given)
        )
        total = total + hidden
        made.append(low_down)
    low_Sr = None if base.down_pair is None else torch.stack(made, dim=1).flatten(0, 1)
    return total.to(base_TR.dtype), low_Sr


def is_masked(base: SharedBase, device: str) -> bool:
    """Whether the low-rank products inside the activation take the form without ragged shapes."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    pairs = [pair for pair in (base.up_pair, base.down_pair) if pair is not None]
    return device != "cpu" and not base.dropout and all(pair.is_stacked(torch.float32) for pair in pairs)


def run_shared_base(base: SharedBase, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What the experts make of tokens.

    Args:
        base: the experts.
        x_TD: (T, D).
        expert_TK: the chosen experts, (T, K).
        weight_TK: their weights, (T, K).

    Returns:
        (T, O), in the dtype that the products have (autocast's, where it is on).
    """
    base_TR = F.linear(x_TD, base.up)
    dtype, paths = base_TR.dtype, Paths(expert_TK, base.num_experts)
    masked = is_masked(base, device_type(x_TD))
    groups = None if masked else paths.groups(dtype, block_rows(base_TR.shape[1], dtype), base.can_join(dtype))

    def grouped(pair: LowRank) -> list[PathGroup] | None:
        return None if masked or pair.is_stacked(dtype) else groups

    low_Sr = None
    if base.up_pair is not None:
        seen = F.dropout(x_TD, base.dropout) if base.dropout else x_TD
        low_Sr = gather_product(seen.to(dtype), base.up_pair.a.to(dtype), paths, grouped(base.up_pair))
        low_Sr = low_Sr * base.up_pair.scale
    if groups is None:
        sum_TF, low_down = _activated_masked(base, paths, base_TR, low_Sr, weight_TK)
    else:
        seed = int(torch.randint(2**62, ())) if base.dropout else 0
        pairs = (
            None if base.up_pair is None else base.up_pair.b.to(dtype),
            None if base.down_pair is None else base.down_pair.a.to(dtype),
        )
        bias = None if base.up_bias is None else base.up_bias.to(dtype)
        sum_TF, low_down = _Activated.apply(
            base.maths,
            Autocast.now(x_TD.device),
            groups,
            (base.dropout, seed),
            base_TR,
            low_Sr,
            weight_TK.reshape(-1),
            *pairs,
            bias,
            *base.maths.shared_parameters(),
        )
    out = F.linear(sum_TF, base.down)
    if base.down_pair is not None and low_down is not None:
        low_down = low_down * base.down_pair.scale
        out = out + sum_product(low_down, base.down_pair.b.to(dtype), paths, grouped(base.down_pair))
    if base.down_bias is not None:
        mixed_TE = weight_TK.new_zeros(len(x_TD), paths.num_experts).scatter_add(1, expert_TK, weight_TK)
        out = out + F.linear(mixed_TE.to(out.dtype), base.down_bias.to(out.dtype).T)
    return out
