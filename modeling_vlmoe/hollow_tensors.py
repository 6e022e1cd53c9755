"""Tensors that have a shape and a dtype and no numbers (torch's `FakeTensor`).

`vlmoe plan` runs a model on them, to see what memory a step takes. Whatever asks one for a number has to do without.
"""

from torch import Tensor
from torch._subclasses import FakeTensor


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers."""
    return isinstance(tensor, FakeTensor)
