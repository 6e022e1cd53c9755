"""Paths: one for each token and each expert that it was sent to. Kernels take them in groups.

Invariant: a group is a run of the paths sorted by expert, of one expert or of several, cut where it is long. Where an
expert's rows are rounded up, the rows added are repeats with weight zero, so that they add nothing to any sum. Half
precision on a CPU needs that: oneDNN builds a new kernel for each number of rows that it has not seen (torch 2.13).

Shapes: T tokens, K experts per token, S = T K paths (path t K + k is token t's k-th), E experts, r rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import is_torch_greater_or_equal

from .hollow_tensors import device_type, is_hollow

# In half precision on a CPU: up to how many rows a group is rounded up to a multiple of how many. Finer for few, so
# that little is added; coarser for many, so that there are few numbers in all.
ROUNDING = ((64, 16), (256, 32))
COARSEST = 64
HALF = (torch.bfloat16, torch.float16)
BLOCK_NUMBERS = 2**19  # of a group's (rows, R): about what a core's cache holds
BLOCK_ROWS = 32
FEW_EXPERTS = 16  # up to here permuting a stack of matrices into another layout is the quicker way (torch 2.13, CPU)

Given = TypeVar("Given", Tensor, Tensor | None)
Function = TypeVar("Function", bound=Callable)


def widened(dtype: torch.dtype) -> torch.dtype:
    """What sums over many rows are held in: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def without_autocast(function: Function) -> Function:
    """A function of tensors, all of one device, inside which autocast is off: it has decided about dtypes already."""

    @wraps(function)
    def run(*args: Any) -> Any:
        device = next(one.device for one in args if isinstance(one, Tensor))
        with torch.autocast(device_type=device.type, enabled=False):
            return function(*args)

    return run  # type: ignore[return-value]


def block_rows(width: int) -> int:
    """How many rows of a width (R) a group of several experts has at most."""
    return max(BLOCK_ROWS, BLOCK_NUMBERS // width // BLOCK_ROWS * BLOCK_ROWS)


@dataclass(frozen=True)
class PathGroup:
    """Paths of some experts that follow one another, sorted by expert.

    Attributes:
        experts: which.
        paths: their numbers, (rows,).
        tokens: their tokens, (rows,).
        bounds: where each expert's rows end.
        ends: the same, (experts,), as `grouped_mm` takes it; None for one expert.
        is_real: which rows are no repeats, (rows,); None where all are.
    """

    experts: range
    paths: Tensor
    tokens: Tensor
    bounds: tuple[int, ...]
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
        if self.ends is not None:
            self.own(total).add_(F.grouped_mm(left.T, right, offs=self.ends))
        elif total.dtype == left.dtype:
            self.own(total).addmm_(left.T, right)
        else:  # of a wider dtype
            self.own(total).add_(left.T @ right)

    def add_large_outer(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """As `add_outer`, without a tensor of the size of the experts' matrices in between."""
        for expert, start, end in zip(self.experts, (0, *self.bounds), self.bounds, strict=False):
            if end > start:
                total[expert].addmm_(left[start:end].T, right[start:end])

    def add_to_rows(self, rows: Tensor, vectors: Tensor) -> None:
        """Adds each row's expert's vector, of (E, width), to (rows, width), in place."""
        rows.add_(self.own(vectors) if self.ends is None else vectors.index_select(0, self._expert_of_row()))

    def add_sum(self, total: Tensor, rows: Tensor) -> None:
        """Adds the sum of each expert's rows, (rows, width), to (E, width), in place."""
        if self.ends is None:
            self.own(total).add_(rows.sum(0))
        else:
            total.index_add_(0, self._expert_of_row(), rows.to(total.dtype))

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

    def groups(self, dtype: torch.dtype, most_rows: int, are_joined: bool, are_cut: bool = True) -> list[PathGroup]:
        """The paths of all experts that have any, in groups.

        Args:
            dtype: what is computed in.
            most_rows: of a group, a multiple of `BLOCK_ROWS`.
            are_joined: whether several experts may share a group.
            are_cut: whether the paths of one expert are cut where they are more; else they make a larger group.
        """
        is_rounded = device_type(self.expert_TK) == "cpu" and dtype in HALF
        order = torch.sort(self.expert_TK.reshape(-1), stable=True).indices
        counts = count_paths(self.expert_TK, self.num_experts)
        if is_hollow(self.expert_TK) and are_cut:  # of groups that are cut the largest stands for all
            counts = [min(self.expert_TK.numel() if are_joined else len(self.expert_TK), most_rows)]
        made: list[list[_Piece]] = []
        room = first = 0
        for expert, count in enumerate(counts):
            while count:
                whole = count + (-count % row_step(count) if is_rounded else 0)
                if not are_joined or not room or (whole > room and not are_cut):
                    made.append([])
                    room = most_rows
                num_rows = min(whole, room) if are_cut else whole
                made[-1].append(_Piece(expert, first, min(count, num_rows), num_rows))
                first, count = first + made[-1][-1].num_paths, count - made[-1][-1].num_paths
                room = max(room - num_rows, 0)
        return [self._group(order, pieces) for pieces in made]

    def _group(self, order: Tensor, pieces: list["_Piece"]) -> PathGroup:
        """The paths in this order that the pieces take, which follow one another."""
        ends = list(accumulate(piece.num_rows for piece in pieces))
        is_real = None
        first = pieces[0].first
        paths = order[first : first + ends[-1]]
        if ends[-1] > sum(piece.num_paths for piece in pieces):
            row = torch.arange(ends[-1], device=order.device)
            given = [
                (piece.first, piece.num_paths, end - piece.num_rows) for piece, end in zip(pieces, ends, strict=True)
            ]
            sizes = torch.tensor([piece.num_rows for piece in pieces], device=order.device)
            table = torch.tensor(given, device=order.device).repeat_interleave(sizes, dim=0, output_size=ends[-1])
            first_path, num_paths, first_row = table.unbind(1)
            is_real = row - first_row < num_paths
            paths = order[first_path + (row - first_row) * is_real]  # repeats are of the piece's first path
        experts = range(pieces[0].expert, pieces[-1].expert + 1)
        end_of = dict(zip((piece.expert for piece in pieces), ends, strict=True))
        bounds = tuple(accumulate((end_of.get(expert, 0) for expert in experts), max))  # without rows: the last one's
        own_ends = torch.tensor(bounds, dtype=torch.int32, device=order.device) if len(experts) > 1 else None
        return PathGroup(experts, paths, paths // self.expert_TK.shape[1], bounds, own_ends, is_real)


@dataclass(frozen=True)
class _Piece:
    """Of a group, the rows of one expert.

    Attributes:
        expert: which.
        first: where its paths begin among those sorted by expert.
        num_paths: how many they are.
        num_rows: those and the repeats.
    """

    expert: int
    first: int
    num_paths: int
    num_rows: int


def can_join(dtype: torch.dtype, device: torch.device, widths: Iterable[int]) -> bool:
    """Whether torch's `grouped_mm` multiplies groups of several experts by matrices of these widths.

    It takes rows of a multiple of 16 bytes, of at most 4 bytes a number; on a CPU any address from torch 2.11 on; a
    GPU of compute capability 8.0 or more.
    """
    if (
        not hasattr(F, "grouped_mm")
        or dtype not in (torch.float32, *HALF)
        or any(width * dtype.itemsize % 16 for width in widths)
    ):
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type != "cpu" or is_torch_greater_or_equal("2.11", accept_dev=True)


def count_paths(expert_TK: Tensor, num_experts: int) -> list[int]:
    """How many paths each expert has, of chosen experts (T, K); all have as many where the choice has no numbers."""
    if is_hollow(expert_TK):
        each, more = divmod(expert_TK.numel(), num_experts)
        return [each + (expert < more) for expert in range(num_experts)]
    return torch.bincount(expert_TK.reshape(-1), minlength=num_experts).tolist()


def row_step(num_rows: int) -> int:
    """What a number of rows is rounded up to a multiple of."""
    return next((step for most, step in ROUNDING if num_rows <= most), COARSEST)


def laid_out(stack: Given) -> Given:
    """A stack of matrices, (E, O, I), one after the other in memory, for one pass alone: PEFT's `b` is a view of
    (O, I, E), which `grouped_mm` does not take; to keep a copy for backward would be to keep another adapter.
    """
    return None if stack is None else stack.contiguous()


def laid_as(stack: Given, other: Given) -> Given:
    """A stack of matrices that lie one after the other, laid out in memory as another."""
    if stack is None or other is None or other.is_contiguous() or not other.movedim(0, -1).is_contiguous():
        return stack
    if len(stack) <= FEW_EXPERTS:
        return stack.permute(1, 2, 0).contiguous().movedim(-1, 0)
    return stack.flatten(1).t().contiguous().view(*stack.shape[1:], -1).movedim(-1, 0)


def _to_paths(rows_TI: Tensor, own: Tensor, groups: list[PathGroup], num_paths: int) -> Tensor:
    """Each path's expert's matrix, of (E, I, O), times its token's row: (S, O)."""
    out = rows_TI.new_zeros(num_paths, own.shape[2])
    for group in groups:
        group.put(out, group.product(rows_TI.index_select(0, group.tokens), group.own(own)))
    return out


def _to_tokens(rows_SI: Tensor, own: Tensor, groups: list[PathGroup], num_tokens: int) -> Tensor:
    """The sum of that over a token's paths, of a row per path: (T, O)."""
    out = rows_SI.new_zeros(num_tokens, own.shape[2], dtype=widened(rows_SI.dtype))
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
            d_weight = weight.new_zeros(weight.shape, dtype=widened(weight.dtype))
            for group in ctx.groups:
                of_gradient, of_source = group.paths, group.tokens
                if ctx.is_summed:
                    of_gradient, of_source = of_source, of_gradient
                rows = group.zero_repeats(gradient.index_select(0, of_gradient))
                group.add_outer(d_weight, rows, source.index_select(0, of_source))
            d_weight = laid_as(d_weight.to(weight.dtype), weight)
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
