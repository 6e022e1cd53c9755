"""How the tensors of delta experts are made, and whole experts of them: see `modeling_vlmoe.delta_experts`.

Upcycling draws each pair's `a` and leaves its `b` zero. Compression (DeRS, 2503.01359) takes the mean of the experts
as the base, or their common weights where they are copies, and of what each expert is apart from it the best pair of
the rank, by truncated SVD (Eckart and Young, 1936). All sums are in float32, all decompositions in float64.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .assignments import Assignment, DenseTensor, Drawing
from .seeding import tensor_generator
from .streaming import cast_blocks

# Singular values below this share of the largest are nothing but rounding.
FLAT = 1e-7


def all_equal(stack: Tensor) -> bool:
    """Whether the experts of a stack, (E, ...), are copies of one another."""
    return all(torch.equal(stack[0], expert) for expert in stack[1:])


def drawn_a(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """New `a`, (..., columns): uniform with variance 1 / (3 columns), as LoRA has it (2106.09685)."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def base_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """The dense tensors, one after the other."""
    for dense in assignment.dense:
        yield from cast_blocks(dense.read(), assignment.spec.dtype)


def pair_a_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """`a`, drawn by its name."""
    generator = tensor_generator(drawing.seed, assignment.spec.name)
    yield drawn_a(assignment.spec.shape, generator).to(assignment.spec.dtype)


def pair_b_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """`b`, zero."""
    yield torch.zeros(assignment.spec.shape, dtype=assignment.spec.dtype)


def sum_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """Whole experts, `base + b a`, one after the other, rounded once."""
    base, a, b = (dense.read() for dense in assignment.dense)
    for expert_a, expert_b in zip(a, b, strict=True):
        yield (base.float() + expert_b.float() @ expert_a.float()).to(assignment.spec.dtype)


def common_base(stack: Tensor) -> Tensor:
    """What experts, (E, rows, columns), share: their weights where they are copies, else the mean; float32."""
    if all_equal(stack):
        return stack[0].float()
    total = torch.zeros(stack.shape[1:])
    for expert in stack:
        total += expert
    return total / len(stack)


def best_pair(difference: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The `a` (rank, columns) and `b` (rows, rank) whose product is nearest to a matrix (rows, columns).

    Singular values are shared between both. They come from the smaller of the two Gram matrices: a whole SVD of an
    LLM's MLP takes minutes. Where there are fewer than the rank, `a` is drawn and `b` is zero, so that training can
    use them.
    """
    is_wide = difference.shape[0] < difference.shape[1]
    matrix = (difference.T if is_wide else difference).double()
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    taken = min(rank, len(values))
    vectors = vectors[:, -taken:].flip(1)
    scale = values[-taken:].flip(0).clamp(min=0).sqrt()
    used = scale > max(FLAT * float(scale[0]), torch.finfo(torch.float32).tiny)
    left = (matrix @ vectors[:, used]) * scale[used].rsqrt()
    right = (vectors[:, used] * scale[used].sqrt()).T
    rows, columns = difference.shape
    a, b = drawn_a((rank, columns), generator), torch.zeros(rows, rank)
    num_used = int(used.sum())
    a[:num_used], b[:, :num_used] = (left.T, right.T) if is_wide else (right, left)
    return a, b


@lru_cache(maxsize=1)
def stack_pairs(
    stack: DenseTensor, rank: int, seed: int, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack's base, and the pairs of all its experts: (rows, columns), (E, rank, columns), (E, rows, rank)."""
    weights, generator = stack.read(), tensor_generator(seed, name)
    base = common_base(weights).to(dtype)  # what is rounded off it, the pairs may make good
    pairs = [best_pair(expert.float() - base.float(), rank, generator) for expert in weights]
    return base, torch.stack([a for a, _ in pairs]).to(dtype), torch.stack([b for _, b in pairs]).to(dtype)


def compressed_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """One of the three tensors that a stack becomes; which, its name and shape say."""
    name, (stack,) = assignment.spec.name, assignment.dense
    weight, _, suffix = name.replace(".deltas.", ".").rpartition("_")
    if suffix not in ("a", "b"):
        yield common_base(stack.read()).to(assignment.spec.dtype)
        return
    rank = assignment.spec.shape[1 if suffix == "a" else 2]
    _, a, b = stack_pairs(stack, rank, drawing.seed, weight, assignment.spec.dtype)
    yield a if suffix == "a" else b


# By name; those of `assignments.STACKED` make something per expert.
DELTA_OPERATIONS = {
    "base": base_blocks,
    "pair a": pair_a_blocks,
    "pair b": pair_b_blocks,
    "sum": sum_blocks,
    "common": compressed_blocks,
    "best a": compressed_blocks,
    "best b": compressed_blocks,
}
