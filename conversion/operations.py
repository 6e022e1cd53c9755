"""How the tensors of a written model are made, block by block, by the name of the operation."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .assignments import EXPERTS, Assignment, Drawing
from .delta_operations import DELTA_OPERATIONS
from .expert_init import EXPERT_INITS, ExpertInit, ExpertSlot
from .router_init import ROUTER_INITS, RouterInit
from .seeding import tensor_generator
from .streaming import cast_blocks, row_blocks


def copy_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """The dense tensor as it is: stored by a parent, or drawn by its source."""
    yield from cast_blocks(assignment.dense[0].read(), assignment.spec.dtype)


def expert_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """Expert after expert, each from the same mapped pages."""
    init: ExpertInit = EXPERT_INITS[drawing.expert_init]
    mlp = assignment.spec.name.rpartition(EXPERTS)[0]
    for expert in range(assignment.num_experts):
        for dense, dense_name in zip(assignment.dense, assignment.dense_names, strict=True):
            made = init(dense.read(), ExpertSlot(mlp, dense_name, expert, drawing.seed))
            yield from cast_blocks(made, assignment.spec.dtype)


def stack_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """Tensors one after the other: those of a stack's experts, or rows of a router, in their order."""
    for dense in assignment.dense:
        yield from cast_blocks(dense.read(), assignment.spec.dtype)


def router_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """A router, drawn by its name."""
    init: RouterInit = ROUTER_INITS[drawing.router_init]
    generator = tensor_generator(drawing.seed, assignment.spec.name)
    num_experts, width = assignment.spec.shape
    yield from cast_blocks(init(num_experts, width, generator), assignment.spec.dtype)


def query_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """The queries of a text gate, standard normal."""
    generator = tensor_generator(drawing.seed, assignment.spec.name)
    yield torch.randn(assignment.spec.shape, generator=generator).to(assignment.spec.dtype)


def grown_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """The dense rows, and for each new token their mean."""
    dense = assignment.dense[0].read()
    yield from cast_blocks(dense, assignment.spec.dtype)
    total = torch.zeros(dense.shape[1:])
    for block in row_blocks(dense):
        total += block.to(torch.float32).sum(0)
    mean = (total / dense.shape[0]).to(assignment.spec.dtype)
    yield mean.expand(assignment.spec.shape[0] - dense.shape[0], *mean.shape)


def mean_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """The mean over the experts of a stack, (E, rows, ...)."""
    stack, total = assignment.dense[0].read(), torch.zeros(assignment.spec.shape)
    for expert in stack:
        total += expert
    yield (total / len(stack)).to(assignment.spec.dtype)


def zero_blocks(assignment: Assignment, drawing: Drawing) -> Iterator[Tensor]:
    """Zeros."""
    yield torch.zeros(assignment.spec.shape, dtype=assignment.spec.dtype)


OPERATIONS: dict[str, Callable[[Assignment, Drawing], Iterator[Tensor]]] = {
    "copy": copy_blocks,
    "expert": copy_blocks,
    "experts": expert_blocks,
    "stack": stack_blocks,
    "rows": stack_blocks,
    "router": router_blocks,
    "queries": query_blocks,
    "grow": grown_blocks,
    "mean": mean_blocks,
    "zeros": zero_blocks,
    **DELTA_OPERATIONS,
}
