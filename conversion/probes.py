"""Looking at one MLP in its dense and in its sparse form, side by side, while the models run.

In the dense run a probe notes what its MLP is really given. In the sparse run these rows, and random ones of which
every expert gets some, are appended to whatever the sparse MLP is given and taken off its result: the model around it
computes as ever, and every expert is read once. The dense MLP is run on the same rows right there and both are
compared, so that nothing of them outlives the layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vlmoe.modality_routing import is_pooled
from modeling_vlmoe.router_losses import RouterContext
from modeling_vlmoe.routers import Router
from modeling_vlmoe.sparse_moe import SparseMoE

from .gaps import Findings, ProofError, measure_gap, nudge
from .mapped_maths import mapped_maths
from .seeding import tensor_generator

FEWEST_ROWS, ROWS_PER_EXPERT = 16, 2
CANDIDATES, MOST_CANDIDATES = 256, 2**14
KEPT_ROWS = 8  # of what the MLP is really given
GIVEN = "what it is given"


def alternating(num_rows: int) -> Tensor:
    """Which of as many rows the probe passes off as of images, (rows,): every other one."""
    return torch.arange(num_rows) % 2 == 1


def context_of(is_image: Tensor | None) -> RouterContext | None:
    """What tells a router which of its tokens are of images, (tokens,); None where it does not ask."""
    return None if is_image is None else RouterContext(learns=False, is_image=is_image[None])


def probe_rows(path: str, router: Router, seed: int) -> Tensor:
    """Random rows by the MLP's name, few and so chosen that the router sends some to every expert.

    Raises:
        ProofError: when some expert is never chosen.
    """
    num_experts, width = router.weight.shape
    generator = tensor_generator(seed, f"{path} probe")
    is_asked = is_pooled(router.moe)
    kept: list[Tensor] = []
    uses = [0] * num_experts
    for _ in range(0, MOST_CANDIDATES, CANDIDATES):
        rows = torch.randn(CANDIDATES, width, generator=generator)
        kinds = (False, True) if is_asked else (False,)
        chosen = [router(rows, context_of(torch.full((len(rows),), kind) if is_asked else None))[2] for kind in kinds]
        for row, experts in zip(rows, torch.cat(chosen, dim=1).tolist(), strict=True):
            if len(kept) < FEWEST_ROWS or any(uses[expert] < ROWS_PER_EXPERT for expert in experts):
                kept += [row.clone()] * len(kinds)  # as one of text, and as one of an image (`alternating`)
                for expert in experts:
                    uses[expert] += 1
        if min(uses) >= ROWS_PER_EXPERT:
            return torch.stack(kept)
    idle = [expert for expert, count in enumerate(uses) if count == 0]
    if not idle:
        return torch.stack(kept)
    raise ProofError(
        f"{path}: experts {idle} are chosen for none of {MOST_CANDIDATES} random tokens, so nothing proves them."
    )


class Probe:
    """One MLP, dense and sparse.

    Args:
        path: Its name in the sparse model.
        dense: The dense module in its place; of an MLP that is spread over its layer, the first piece.
        run: Runs the dense MLP on rows, (1, rows, D).
        sparse: The module in its place.
        dtype: What dense weights are rounded to.
        seed: Of the random rows.
        findings: Where its gaps go.
    """

    def __init__(
        self,
        path: str,
        dense: nn.Module,
        run: Callable[[Tensor], Tensor],
        sparse: SparseMoE,
        dtype: torch.dtype,
        seed: int,
        findings: Findings,
    ):
        self.path, self.dense, self.run, self.sparse = path, dense, run, sparse
        self.dtype, self.seed, self.findings = dtype, seed, findings
        self.given: Tensor | None = None
        self.rows: Tensor | None = None
        self.is_image: Tensor | None = None  # which rows are of images, where the router asks
        self.is_done = False  # a ViT may run again in the same model, on frames

    def _note(self, module: nn.Module, args: tuple) -> None:
        if self.given is None:
            self.given = self._first_rows(args[0])

    @staticmethod
    def _first_rows(given: Tensor) -> Tensor:
        return given.reshape(-1, given.shape[-1])[:KEPT_ROWS].clone()

    def _random_rows(self) -> Tensor:
        return probe_rows(self.path, self.sparse.router, self.seed)

    def _append(self, module: nn.Module, args: tuple) -> tuple:
        if self.is_done:
            return args
        assert self.given is not None
        given = args[0]
        self.findings.informative[f"{self.path}, {GIVEN}"] = measure_gap(self.given, self._first_rows(given))
        self.rows = torch.cat([self.given, self._random_rows()])
        self._tell_images(module, given)
        rows = self.rows.expand(*given.shape[:-2], *self.rows.shape)
        # A residual, which some MLPs are given and add, is zero for them.
        return torch.cat([given, rows], dim=-2), *(
            torch.cat([one, torch.zeros_like(rows)], dim=-2) for one in args[1:]
        )

    def _tell_images(self, module: Any, given: Tensor) -> None:
        """Passes every other random row off as one of an image, where the block's router asks."""
        context = getattr(module, "context", None)
        if context is None or context.is_image is None:
            return
        assert self.rows is not None
        assert self.given is not None
        known = context.is_image.reshape(given.shape[:-1])
        more = alternating(len(self.rows) - len(self.given))
        self.is_image = torch.cat([known.reshape(-1)[: len(self.given)], more])
        whole = torch.cat([known, self.is_image.expand(*known.shape[:-1], -1)], dim=-1)
        module.context = replace(context, is_image=whole)

    def _compare(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if self.is_done:
            return output
        assert self.rows is not None
        assert self.given is not None
        own, extra = output.split([output.shape[-2] - len(self.rows), len(self.rows)], dim=-2)
        sparse = extra.reshape(-1, *extra.shape[-2:])[0]
        dense = self._run_dense(self.rows, self.is_image)
        num_real = len(self.given)
        for where, part in (("random input", slice(num_real, None)), ("the dense model's input", slice(num_real))):
            nudged = partial(self._run_nudged, self.rows[part], None if self.is_image is None else self.is_image[part])
            self.findings.judge(f"{self.path} on {where}", dense[part], sparse[part], nudged)
        self.given, self.rows, self.is_image, self.is_done = None, None, None, True
        return own

    def _run_dense(self, rows: Tensor, is_image: Tensor | None) -> Tensor:
        with mapped_maths(self.dtype):
            return self.run(rows[None])[0]

    def _run_nudged(self, rows: Tensor, is_image: Tensor | None) -> Tensor:
        return self._run_dense(nudge(rows, tensor_generator(self.seed, f"{self.path} nudge")), is_image)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within it the dense model runs.

        Raises:
            ProofError: naming the MLP, when it does not run.
        """
        with hooked(self.dense.register_forward_pre_hook(self._note)):
            yield
        if self.given is None:
            raise ProofError(
                f"{self.path} does not run in the dense model on what the proof gives it, so nothing proves its "
                "experts. Leave its layer out of the layers that are to have experts."
            )

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Within it the sparse model runs.

        Raises:
            ProofError: naming the MLP, when it is not the dense one, or does not run.
        """
        before = self.sparse.register_forward_pre_hook(self._append)
        with hooked(before), hooked(self.sparse.register_forward_hook(self._compare)):
            yield
        if not self.is_done:
            raise ProofError(f"{self.path} runs in the dense model, but not in what was written.")


@contextmanager
def hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """A hook that goes when the block ends."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def all_of(contexts: list) -> Iterator[None]:
    """Several contexts at once."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
