"""`lr_reset: false`: a stage goes on with the learning-rate schedule of the one before, one schedule over both."""

from dataclasses import replace

from ..arguments import FinetuneArguments
from .stages import Chain, Stage

LR_RESET = "lr_reset"
# What two stages of one schedule have in common.
OF_SCHEDULE = (
    "learning_rate",
    "learning_rates",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmups",
)


def steps_of(args: FinetuneArguments, where: str) -> int:
    """The steps of a stage whose schedule spans others.

    Raises:
        ValueError: if the recipe does not say them.
    """
    if args.max_steps < 1:
        raise ValueError(
            f"{where} shares one schedule with the stage beside it (lr_reset: false), whose length has to be known "
            "before the first of them; give both max_steps."
        )
    return args.max_steps


def join_schedules(chain: Chain) -> Chain:
    """The chain with the schedules of stages that say `lr_reset: false` made parts of one.

    Raises:
        ValueError: where there is nothing to go on from, steps are not known, or the schedules are not one.
    """
    spans: list[list[Stage]] = []
    for stage in chain.stages:
        is_reset = stage.settings.get(LR_RESET, True)
        if is_reset not in (True, False):
            raise ValueError(
                f"Stage {stage.name} of {chain.origin}: lr_reset is {is_reset!r}; expected true or false."
            )
        if stage.upcycle is not None:
            continue
        if not is_reset and not spans:
            raise ValueError(
                f"Stage {stage.name} of {chain.origin} says lr_reset: false, but no training comes before it; leave "
                "it out."
            )
        if is_reset:
            spans.append([])
        spans[-1].append(stage)
    made = {stage.number: stage for stage in chain.stages}
    for span in spans:
        bare = [_without_reset(stage) for stage in span]
        parsed = [chain.arguments(stage) for stage in bare]
        wheres = [f"Stage {stage.name} of {chain.origin}" for stage in span]
        place = {}
        if len(span) > 1:
            steps = [steps_of(args, where) for args, where in zip(parsed, wheres, strict=True)]
            place = {"schedule_steps": sum(steps)}
        for index, stage in enumerate(bare):
            if place and index:
                check_one_schedule(parsed[0], parsed[index], wheres[index])
            start = {"schedule_start": sum(steps[:index])} if place else {}
            made[stage.number] = replace(stage, settings={**stage.settings, **place, **start})
    return replace(chain, stages=tuple(made[stage.number] for stage in chain.stages))


def _without_reset(stage: Stage) -> Stage:
    return replace(stage, settings={key: value for key, value in stage.settings.items() if key != LR_RESET})


def check_one_schedule(first: FinetuneArguments, later: FinetuneArguments, where: str) -> None:
    """Refuses one schedule over stages that say different ones.

    Raises:
        ValueError: naming what differs.
    """
    for name in OF_SCHEDULE:
        if getattr(first, name) != getattr(later, name):
            raise ValueError(
                f"{where} goes on with the schedule before it (lr_reset: false), but its {name} is "
                f"{getattr(later, name)}, not {getattr(first, name)}; give both the same, or leave lr_reset out."
            )
