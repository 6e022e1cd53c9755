"""Looking at one MLP in its dense and in its sparse form while each model runs, with random rows riding along.

The rows are appended to whatever the MLP is given and taken off its result, so the model around it computes as ever,
and every weight is read once for both questions: is this layer the same function on random input, and on what it is
really given?
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from modeling_vlmoe.sparse_moe import Router

from .seeding import tensor_generator

FIRST_ROWS, MOST_ROWS = 16, 2**14
KEPT_ROWS = 32  # of what the MLP is really given


class ProofError(ValueError):
    """What was written does not compute what its parents compute."""


def measure_gap(dense: Tensor, sparse: Tensor) -> float:
    """The largest difference, in standard deviations of the dense result; infinite for what is no number."""
    difference = (dense - sparse).abs().max().item()
    spread = dense.std().item()
    gap = difference / spread if spread > 0 else (0.0 if difference == 0 else float("inf"))
    return gap if gap == gap else float("inf")


def probe_rows(path: str, router: Router | None, width: int, seed: int) -> Tensor:
    """Random rows by the MLP's name: so many that its router sends some to every expert.

    Raises:
        ProofError: when some expert is never chosen.
    """
    count = FIRST_ROWS
    while True:
        rows = torch.randn(count, width, generator=tensor_generator(seed, f"{path} probe"))
        if router is None:
            return rows
        idle = set(range(router.weight.shape[0])) - set(router(rows)[2].unique().tolist())
        if not idle:
            return rows
        if count >= MOST_ROWS:
            raise ProofError(
                f"{path}: experts {sorted(idle)} are chosen for none of {count} random tokens, so nothing proves them."
            )
        count *= 2


class Probe:
    """One MLP, dense and sparse.

    Args:
        path: Its name in the sparse model.
        dense: The dense module.
        sparse: The module in its place.
        seed: Of the random rows.
    """

    def __init__(self, path: str, dense: nn.Module, sparse: nn.Module, width: int, seed: int):
        self.path, self.dense, self.sparse = path, dense, sparse
        self.rows = probe_rows(path, getattr(sparse, "router", None), width, seed)
        self.results: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def _append(self, module: nn.Module, args: tuple) -> tuple:
        given = args[0]
        return torch.cat([given, self.rows.expand(*given.shape[:-2], *self.rows.shape)], dim=-2), *args[1:]

    def _take_off(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        real, random = output.split([output.shape[-2] - len(self.rows), len(self.rows)], dim=-2)
        self.results[module] = (random.clone(), real[..., :KEPT_ROWS, :].clone())
        return real

    @contextmanager
    def riding(self, module: nn.Module) -> Iterator[None]:
        """Within it the rows ride through `module`, the dense or the sparse one."""
        hooks = (module.register_forward_pre_hook(self._append), module.register_forward_hook(self._take_off))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def gaps(self) -> dict[str, float]:
        """The gap on random rows, and on what the MLP was given in the running model."""
        dense_random, dense_real = self.results.pop(self.dense)
        sparse_random, sparse_real = self.results.pop(self.sparse)
        return {
            "random input": measure_gap(dense_random, sparse_random),
            "in the model": measure_gap(dense_real, sparse_real),
        }


@contextmanager
def all_riding(modules: list[tuple[Probe, nn.Module]]) -> Iterator[None]:
    """The rows of several probes ride at once."""
    with ExitStack() as rides:
        for probe, module in modules:
            rides.enter_context(probe.riding(module))
        yield
