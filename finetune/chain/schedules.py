"""A learning-rate schedule that goes on where an earlier stage left it, in the place of one of its own.

Upcycling with a schedule of its own behind it, which begins with a warm-up and the full learning rate, is the default:
that reset is what makes copied experts unlike one another (NVIDIA, 2410.07524). The optimizer always begins anew: a
sparse model has other weights than the dense one.
"""

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ..arguments import FinetuneArguments


def shifted(factor: Callable[[int], float], start: int) -> Callable[[int], float]:
    """A schedule's factor, counted from a later step."""
    return lambda step: factor(step + start)


def shift(scheduler: Any, start: int) -> None:
    """Makes a schedule at its first step begin at a later one.

    Raises:
        ValueError: for a schedule that is no function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"lr_reset=false needs a schedule that follows from the step alone, but lr_scheduler_type gives a "
            f"{type(scheduler).__name__}; choose linear, cosine or another such, or leave lr_reset out."
        )
    scheduler.lr_lambdas = [shifted(factor, start) for factor in scheduler.lr_lambdas]
    factors = [factor(0) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def continue_schedule(trainer: Trainer, args: FinetuneArguments) -> None:
    """Makes a trainer's schedule a part of a longer one, where `schedule_steps` says how long that is."""
    if args.schedule_steps is None:
        return
    create, total, start = trainer.create_scheduler, args.schedule_steps, args.schedule_start or 0

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        is_new = trainer.lr_scheduler is None
        scheduler = create(total, optimizer)
        if is_new:
            shift(scheduler, start)
        return scheduler

    trainer.create_scheduler = create_scheduler  # type: ignore[method-assign]
