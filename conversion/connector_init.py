"""The connector of two parents that have never met: a dense MLP that is drawn, and then made sparse like any other."""

import torch
from torch import Tensor

from .seeding import tensor_generator


class DrawnConnector:
    """A dense connector that is read like a checkpoint. Its tensors depend on the seed and their names only.

    A dense and a sparse conversion of the same seed therefore start from the same connector.

    Args:
        shapes: Its tensors' names in the model and their shapes.
        seed: The run's seed.
        std: Standard deviation of the weights; biases are zero. As in the model's own initialisation.
        dtype: The dtype it is given in.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int, std: float, dtype: torch.dtype):
        self._shapes, self._seed, self._std, self._dtype = shapes, seed, std, dtype

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def tensor(self, name: str) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(self._shapes[name], dtype=self._dtype)
        generator = tensor_generator(self._seed, name)
        return torch.empty(self._shapes[name]).normal_(std=self._std, generator=generator).to(self._dtype)
