"""Looking at two sparse blocks side by side, one of the host's and one of ours, while their models run.

Trained routers may leave an expert idle on any rows that one can think of. So every expert is also called past the
router: both stacks get the same rows, the same choice and the same weights, and every expert is in the choice.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .gaps import nudge
from .mapped_maths import mapped_maths
from .probes import FEWEST_ROWS, Probe, context_of
from .seeding import tensor_generator


class BlockProbe(Probe):
    """One block of experts in two models; `dense` is the block, or a dense MLP, that is known to be right.

    As `Probe` otherwise: on random rows, and on what the model really gives the block.
    """

    def _random_rows(self) -> Tensor:
        assert self.given is not None
        generator = tensor_generator(self.seed, f"{self.path} probe")
        return torch.randn(2 * FEWEST_ROWS, self.given.shape[-1], generator=generator)

    def _run_dense(self, rows: Tensor, is_image: Tensor | None) -> Tensor:
        reference: Any = self.dense
        if is_image is None:
            return super()._run_dense(rows, is_image)
        reference.context = context_of(is_image)
        try:
            return super()._run_dense(rows, is_image)
        finally:
            reference.context = None

    def _compare(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        was_done = self.is_done
        own = super()._compare(module, args, output)
        if not was_done:
            self._compare_experts(args[0].shape[-1])
        return own

    def _compare_experts(self, width: int) -> None:
        """Both stacks of experts, past their routers.

        Raises:
            ProofError: naming the block.
        """
        made: Any = getattr(self.sparse, "experts", None)
        if made is None:
            return
        generator = tensor_generator(self.seed, f"{self.path} experts")
        rows = torch.randn(max(FEWEST_ROWS, made.num_experts), width, generator=generator)
        index = (torch.arange(len(rows)) % made.num_experts)[:, None]
        weights = 0.5 + torch.rand(index.shape, generator=generator)
        wanted, nudged = (
            self._run_reference(rows, index, weights),
            partial(self._run_nudged_experts, rows, index, weights),
        )
        with mapped_maths(self.dtype):
            got = made(rows, index, weights)
        self.findings.judge(f"{self.path} by every expert", wanted, got, nudged)

    def _run_reference(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        reference: Any = self.dense
        with mapped_maths(self.dtype):
            if hasattr(reference, "experts"):
                return reference.experts(rows, index, weights)
            return reference(rows[None])[0] * weights  # a dense layer that is written as equal experts

    def _run_nudged_experts(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self._run_reference(nudge(rows, tensor_generator(self.seed, "experts nudge")), index, weights)
