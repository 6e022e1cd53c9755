"""Warm-ups of parts: the host's schedule, once for each number of warm-up steps."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from .groups import PART, value_of

if TYPE_CHECKING:
    from ..arguments import FinetuneArguments


def schedule(args: "FinetuneArguments", num_steps: int, num_warmup_steps: int) -> Callable[[int], float]:
    """What the recipe's schedule multiplies a learning rate by, at each step: the host's own function.

    Raises:
        ValueError: if the schedule is not one of steps.
    """
    alone = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kind: Any = args.lr_scheduler_type
    made: Any = get_scheduler(kind, alone, num_warmup_steps, num_steps, args.lr_scheduler_kwargs)  # type: ignore[arg-type]
    if not isinstance(made, LambdaLR):
        raise ValueError(
            f"warmups are given, but lr_scheduler_type {getattr(kind, 'value', kind)} is no schedule of steps. Choose "
            "another, such as cosine, or leave warmups out."
        )
    return made.lr_lambdas[0]


def check_warms_up(args: "FinetuneArguments") -> None:
    """Refuses warm-ups of parts where the schedule has none.

    Raises:
        ValueError: saying what to choose.
    """
    if args.warmups and schedule(args, 10, 5)(0) == schedule(args, 10, 0)(0):
        kind: Any = args.lr_scheduler_type
        raise ValueError(
            f"warmups are given, but lr_scheduler_type {getattr(kind, 'value', kind)} has no warm-up. Choose another, "
            "such as constant_with_warmup, or leave warmups out."
        )


def num_warmup_steps(args: "FinetuneArguments", part: str, num_steps: int) -> int:
    """The warm-up of a part, in steps; `warmup_steps` where it has none of its own."""
    if (warmup := value_of(part, args.warmups)) is None:
        return args.get_warmup_steps(num_steps)
    return int(warmup) if warmup >= 1 else math.ceil(num_steps * warmup)


def grouped_schedule(optimizer: torch.optim.Optimizer, args: "FinetuneArguments", num_steps: int) -> LambdaLR:
    """The recipe's schedule, with a warm-up of its own for each part that has one.

    Args:
        optimizer: whose groups are split by part.
        args: the recipe.
        num_steps: of the whole training.
    """
    parts = [group[PART] for group in optimizer.param_groups]
    return LambdaLR(optimizer, [schedule(args, num_steps, num_warmup_steps(args, part, num_steps)) for part in parts])
