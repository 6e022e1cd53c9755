"""Whether a loss falls, by medians: those of a run's first steps beside those of its last; and why it may not.

Shapes of what is decided: two windows of W losses each. The loss falls when the median of the last window lies below
that of the first one by more than 1 % of it, or by more than what their scatter explains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .finite import local

LEAST_STEPS = 20
LEAST_WINDOW = 5
SHARE = 5  # a window is this part of the steps
LEAST_FALL = 0.01  # of the first median
ROSE = 1.2  # times the first median
LEARNT = 0.05  # a loss below this leaves little to learn
SAMPLE = 4096  # numbers of each trained weight that are kept to be compared
STILL = 1e-4  # weights that moved less than this share of their size hardly moved
SPREAD = 1.4826 * 1.2533  # the standard error of a median, from the median deviation, times the root of the count


@dataclass(frozen=True)
class Trend:
    """A loss at the beginning and at the end.

    Attributes:
        first: median of the first window.
        last: median of the last window.
        noise: standard error of their difference.
        window: losses in each.
    """

    first: float
    last: float
    noise: float
    window: int

    @property
    def falls(self) -> bool:
        """Whether there is nothing to say."""
        fall = self.first - self.last
        return fall > LEAST_FALL * abs(self.first) or fall > 2 * self.noise > 0 or self.last < LEARNT


def _error(losses: Sequence[float]) -> float:
    middle = median(losses)
    return SPREAD * median(abs(one - middle) for one in losses) / len(losses) ** 0.5


def find_trend(losses: Sequence[float]) -> Trend | None:
    """The trend of a run's losses, one a step; None where there are too few."""
    if len(losses) < LEAST_STEPS:
        return None
    window = max(len(losses) // SHARE, LEAST_WINDOW)
    first, last = losses[:window], losses[-window:]
    return Trend(median(first), median(last), (_error(first) ** 2 + _error(last) ** 2) ** 0.5, window)


class Movement:
    """How far a model's trained weights move: a sample of each is kept.

    Args:
        model: before training.
    """

    def __init__(self, model: nn.Module):
        self.before = {name: self._sample(one) for name, one in model.named_parameters() if one.requires_grad}

    @staticmethod
    def _sample(weight: Tensor) -> Tensor:
        numbers = local(weight).detach().flatten()
        step = max(numbers.numel() // SAMPLE, 1)
        return numbers[::step][:SAMPLE].float().cpu().clone()

    @torch.no_grad()
    def share(self, model: nn.Module) -> float:
        """How far, divided by the weights' size."""
        moved = size = 0.0
        for name, one in model.named_parameters():
            if name in self.before and self.before[name].numel():
                after = self._sample(one)
                moved += (after - self.before[name]).square().sum().item()
                size += after.square().sum().item()
        return (moved / size) ** 0.5 if size else 0.0


@dataclass(frozen=True)
class Facts:
    """What was measured of a run whose loss does not fall.

    Attributes:
        steps: optimizer steps.
        rate: the highest learning rate so far.
        num_trained: trained tensors.
        num_moving: those of them that got a gradient other than zero.
        num_targets: tokens to learn, a step.
        moved: how far the trained weights moved, as a share of their size.
        is_rounded: whether trained weights are in bfloat16 or float16.
    """

    steps: int
    rate: float
    num_trained: int
    num_moving: int
    num_targets: float | None
    moved: float
    is_rounded: bool


def reason(trend: Trend, facts: Facts) -> str:
    """The likely reason, with its figures and what to do."""
    moved = f"in {facts.steps} steps the trained weights moved by {facts.moved:.1e} of their size"
    if facts.rate == 0:
        return "The learning rate is 0: raise learning_rate, and check lr_scheduler_type and warmup_steps."
    if facts.num_targets == 0:
        return "No token is a target: all labels are -100. Give rows with an answer, and check the collator."
    if facts.num_moving == 0:
        return (
            f"None of the {facts.num_trained} trained tensors got a gradient: what is trained is not used by these "
            "rows (a connector by rows without images, say). Choose what is trained: method, lora_targets."
        )
    if trend.last > ROSE * trend.first:
        return f"The loss rose, and {moved}: lower learning_rate ({facts.rate:.3g}), or begin with a warm-up."
    if facts.moved < STILL:
        rounding = " Or train in float32 (dtype=float32): 16 bits round small steps away." if facts.is_rounded else ""
        return (
            f"The learning rate is small: {moved}, at a learning rate of {facts.rate:.3g}. Raise learning_rate."
            f"{rounding}"
        )
    idle = facts.num_trained - facts.num_moving
    unused = f", {idle} of {facts.num_trained} trained tensors without a gradient" if idle else ""
    return (
        f"No single reason is seen ({moved}{unused}): check that the answers follow from the questions and images, "
        f"try learning_rate={facts.rate * 3:.3g} and {facts.rate / 3:.3g}, or train more of the model."
    )


def trained_state(model: nn.Module) -> dict[str, Any]:
    """Of the trained tensors: how many there are, and whether they are held in 16 bits."""
    trained = [one for one in model.parameters() if one.requires_grad]
    is_rounded = any(one.dtype in (torch.bfloat16, torch.float16) for one in trained)
    return {"num_trained": len(trained), "is_rounded": is_rounded}
