"""How far two results are apart, and how far they may be.

A gap is the largest difference in standard deviations of the dense result. `LIMIT` is allowed. Where the dense model
itself answers the last bit of its input with more than that (deep or wide parents, results with heavy tails), no two
ways to compute it agree to `LIMIT`: then `FLOOR_FACTOR` times this rounding floor is allowed. The floor is measured
only when a gap exceeds `LIMIT`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

LIMIT = 1e-5
# A nudge draws the rounding of every layer anew and carries it through the model, as another order of sums does. Right
# conversions were 0.2 to 0.4 floors apart for whole models and up to 2 for a single MLP (of 8 rows, whose kernel sums
# one way in any case); the mutants of the tests are hundreds apart.
FLOOR_FACTOR = 3
# A dense model whose own floor is higher draws at random, or is chaotic: nothing can be proved of it.
MOST_FLOOR = 1e-3


# What a gap that is too large means, where nothing else is said.
DENSE_CLAIM = "The sparse model is not its dense parents"


class ProofError(ValueError):
    """What was written does not compute what its parents compute."""


def measure_gap(dense: Tensor, sparse: Tensor) -> float:
    """The largest difference, in standard deviations of the dense result; infinite for what is no number, and for
    results of unlike shapes.
    """
    if dense.shape != sparse.shape:
        return float("inf")
    difference = (dense - sparse).abs().max().item()
    spread = dense.std().item()
    gap = difference / spread if spread > 0 else (0.0 if difference == 0 else float("inf"))
    return gap if gap == gap else float("inf")


def nudge(values: Tensor, generator: torch.Generator) -> Tensor:
    """Moves every value by its last bit, up or down: a relative noise of about 6e-8 in float32."""
    signs = torch.randint(2, values.shape, generator=generator) * 2.0 - 1.0
    return values + values * signs * 2**-24


@dataclass(frozen=True)
class Gap:
    """A judged gap.

    Attributes:
        gap: What was measured.
        limit: What it was judged by.
        floor: The dense model's answer to a nudge, where it had to be measured.
    """

    gap: float
    limit: float = LIMIT
    floor: float | None = None


@dataclass
class Findings:
    """What a proof measured.

    Attributes:
        judged: What decides whether there is a checkpoint.
        informative: What only helps people: where a difference begins, what a cast costs.
        lossy: What was proved with weights that sum to one, and is apart from the dense results by the routing that
            was asked for (see lossy_routing.py).
        scales: For parts whose weights are raw: the measured `routed_scaling_factor` of each sparse layer.
        claim: What a gap that is too large means, for the message.
    """

    judged: dict[str, Gap] = field(default_factory=dict)
    informative: dict[str, float] = field(default_factory=dict)
    lossy: dict[str, float] = field(default_factory=dict)
    scales: dict[str, list[float]] = field(default_factory=dict)
    claim: str = field(default=DENSE_CLAIM, repr=False, compare=False)

    @property
    def largest(self) -> Gap:
        return max(self.judged.values(), key=lambda one: one.gap)

    def judge(self, what: str, dense: Tensor, sparse: Tensor, nudged: Callable[[], Tensor], where: str = "") -> None:
        """Keeps a gap that is small enough.

        Args:
            what: What is compared.
            dense: The dense result.
            sparse: The sparse one.
            nudged: Gives the dense result for nudged input.
            where: What is known about where a difference begins, for the message.

        Raises:
            ProofError: saying what differs by how much.
        """
        found = Gap(measure_gap(dense, sparse))
        if found.gap > LIMIT and isfinite(found.gap):
            floor = measure_gap(dense, nudged())
            if not floor <= MOST_FLOOR:
                raise ProofError(
                    f"Nothing can be proved: {what} of the dense model itself moves by {floor:.2g} standard "
                    f"deviations when its input moves by a last bit, {MOST_FLOOR:.2g} are allowed. It draws at "
                    "random, as ViT-MAE does, or its weights are broken. No checkpoint is written."
                )
            found = Gap(found.gap, max(LIMIT, FLOOR_FACTOR * floor), floor)
        if not (isfinite(found.gap) and found.gap <= found.limit):
            raise ProofError(
                f"{self.claim}: {what}{where} differs by {found.gap:.2g} standard deviations, {found.limit:.2g} are "
                "allowed. No checkpoint is written."
            )
        self.judged[what] = found
