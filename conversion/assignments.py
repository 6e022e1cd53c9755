"""How one tensor of a written model is filled: from which tensors, by which operation. Data alone."""

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from .streaming import TensorSpec

# Parts of the names of tensors.
EXPERTS, ROUTER = ".experts.", ".router."
DELTAS = "deltas."
# How the tensors of a text gate in a router are made that are not drawn as the router is, and an expert bias.
ROUTER_OPERATIONS = {"text_gate.queries": "queries", "text_gate.readout": "zeros", "expert_bias": "zeros"}
# Operations that make something per expert, of which a token uses some.
STACKED = ("experts", "stack", "expert", "pair a", "pair b", "sum", "best a", "best b")


class TensorSource(Protocol):
    """Whatever gives tensors by name: a parent's checkpoint, or a connector that is drawn."""

    @property
    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class DenseTensor:
    """One dense tensor: where it is read, and under which name."""

    source: TensorSource
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.name)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype(self.name)

    @property
    def stored(self) -> "DenseTensor":
        """What is read, however it is looked at."""
        return self

    def read(self) -> Tensor:
        return self.source.tensor(self.name)


@dataclass(frozen=True)
class StackRows(DenseTensor):
    """Some rows of one expert in a stack (E, rows, ...), or of every expert where `expert` is None."""

    expert: int | None
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        num_experts, _, *rest = super().shape
        rows = self.stop - self.start
        return (num_experts, rows, *rest) if self.expert is None else (rows, *rest)

    def read(self) -> Tensor:
        stack = super().read()[:, self.start : self.stop]
        return stack if self.expert is None else stack[self.expert]


@dataclass(frozen=True)
class TransposedTensor(DenseTensor):
    """A matrix that is stored (in, out), as (out, in)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return super().shape[::-1]

    @property
    def stored(self) -> DenseTensor:
        return DenseTensor(self.source, self.name)

    def read(self) -> Tensor:
        return super().read().mT


@dataclass(frozen=True)
class Assignment:
    """How one tensor of the sparse model is filled.

    Attributes:
        spec: The target's name, dtype and shape.
        operation: A key of `OPERATIONS`.
        dense: The dense tensors it is made of, in the order of its rows.
        dense_names: What they are called inside their MLP (for experts).
        num_experts: Experts in the stack (for experts and routers).
        num_active: How many of them a token uses.
    """

    spec: TensorSpec
    operation: str
    dense: tuple[DenseTensor, ...] = ()
    dense_names: tuple[str, ...] = ()
    num_experts: int = 1
    num_active: int = 1

    @property
    def num_parameters(self) -> int:
        return prod(self.spec.shape)

    @property
    def num_active_parameters(self) -> int:
        return (
            self.num_parameters * self.num_active // self.num_experts
            if self.operation in STACKED
            else self.num_parameters
        )


@dataclass(frozen=True)
class Drawing:
    """What the operations draw with."""

    expert_init: str
    router_init: str
    seed: int
