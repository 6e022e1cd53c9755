"""Tensors that have a shape and a dtype and no numbers (torch's `FakeTensor`).

`vlmoe plan` runs a model on them, to see what memory a step takes. Whatever asks one for a number has to do without.
They all say that they are on a CPU, since torch takes others only where it has the device; what they stand for is said
beside them:

    >>> with standing_for("cuda"):
    ...     device_type(hollow)
    'cuda'
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch._subclasses import FakeTensor

_STANDS_FOR: ContextVar[str] = ContextVar("stands_for", default="cpu")


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers."""
    return isinstance(tensor, FakeTensor)


def device_type(tensor: Tensor) -> str:
    """The kind of device that a tensor is on; of one without numbers, of the device that it stands for."""
    return _STANDS_FOR.get() if is_hollow(tensor) else tensor.device.type


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Within it tensors without numbers stand for those of a kind of device: "cpu", "cuda"."""
    before = _STANDS_FOR.set(device)
    try:
        yield
    finally:
        _STANDS_FOR.reset(before)
