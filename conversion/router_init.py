"""How the weight of a new router is drawn (MATHS section 3)."""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

RouterInit = Callable[[int, int, torch.Generator], Tensor]


def uniform(num_experts: int, width: int, generator: torch.Generator) -> Tensor:
    """Uniform with variance 1 / (3 width): on normed input the logits have the same spread at any width."""
    bound = 1 / sqrt(width)
    return torch.empty(num_experts, width).uniform_(-bound, bound, generator=generator)


ROUTER_INITS: dict[str, RouterInit] = {"uniform": uniform}
