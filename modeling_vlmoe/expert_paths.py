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
BLOCK_BYTES = 2**22  # of a group's (rows, R): about what a cache holds
BLOCK_ROWS = 32

Function = TypeVar("Function", bound=Callable)


def without_autocast(function: Function) -> Function:
    """A function of tensors, all of one device, inside which autocast is off: it has decided about dtypes already."""

    @wraps(function)
    def run(*args: Any) -> Any:
        device = next(one.device for one in args if isinstance(one, Tensor))
        with torch.autocast(device_type=device.type, enabled=False):
            return function(*args)

    return run  # type: ignore[return-value]


def block_rows(width: int, dtype: torch.dtype) -> int:
    """How many rows of a width (R) a group of several experts has at most."""
    return max(BLOCK_ROWS, BLOCK_BYTES // (width * dtype.itemsize) // BLOCK_ROWS * BLOCK_ROWS)


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

    def add_large_outer(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds each expert's `left.T @ right`, of rows (rows, O) and (rows, I), to (E, O, I), in place, with no tensor
        of that size in between.
        """
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
        num_stand_ins = 1
        if is_hollow(self.expert_TK) and are_cut:  # of groups that are cut the largest stands for all
            num_stand_ins = self._num_stand_ins(max(counts, default=0), most_rows, are_joined)
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
        return [self._group(order, pieces) for pieces in made] * num_stand_ins

    def _num_stand_ins(self, most_of_one: int, most_rows: int, are_joined: bool) -> int:
        """How many groups stand for all: as many, up to three, as one expert or all of them come to, since sums and
        what is kept for backward depend on that.
        """
        if (are_joined or self.num_experts == 1) and self.expert_TK.numel() <= most_rows:
            return 1
        return 2 if most_of_one <= most_rows else 3

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
