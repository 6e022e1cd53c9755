"""The control's steps where it is to cost as much as the sparse model, stage by stage:

    steps of the control = steps of the sparse stage x operations of its step / operations of the control's step

Operations are those of the first micro-batch (see flops.py). They follow from shapes: weights that are trained later
change nothing in them, as no token is dropped and each goes to as many experts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import FinetuneArguments
from ..chain.processes import on_main
from ..chain.run import run_chain
from ..chain.seen_records import steps_taken
from ..chain.stages import Stage
from ..chain.whole_checkpoints import write_atomically
from .arms import DENSE, SPARSE, Pair
from .flops import step_flops

FLOPS_NAME = "flops.json"
Counts = dict[str, dict[str, int]]


def counted(path: Path, args: FinetuneArguments, key: str, count: Callable[[FinetuneArguments], int]) -> int:
    """The operations of a step, kept in a file, so that a resumed run has the same ones.

    Args:
        path: the file.
        args: the recipe.
        key: whose step it is.
        count: counts it, in every process.
    """
    settings = json.dumps(args.settings(), sort_keys=True, default=str)
    key = f"{key} {hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    known: dict[str, int] = on_main(lambda: json.loads(path.read_text()) if path.is_file() else {})
    if key in known:
        return known[key]
    found = count(args)

    def keep() -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known | {key: found}, indent=1) + "\n")
        return found

    return on_main(keep)


def check_one_schedule(pair: Pair) -> None:
    """Refuses stages of one schedule, whose lengths would no longer fit.

    Raises:
        ValueError: naming the stage.
    """
    for stage in pair.dense.stages:
        if stage.settings.get("schedule_steps") is not None:
            raise ValueError(
                f"control_match is flops, which gives stage {stage.name} other steps, but lr_reset: false makes its "
                "schedule a part of one whose length is said; leave one of them out."
            )


def match_flops(pair: Pair, folder: Path, say: Callable[[str], None] | None) -> tuple[Pair, Counts]:
    """A pair whose control costs what the sparse model cost, which has been trained.

    Args:
        pair: both chains.
        folder: where counts are kept.
        say: takes lines on what is under way.

    Returns:
        The pair, and by stage the operations of a step of each.
    """
    head = tuple(stage for stage in pair.dense.stages if stage.upcycle is not None)
    if head:
        run_chain(replace(pair.dense, stages=head, is_begun_only=True), say)
    stages: list[Stage] = list(head)
    told: Counts = {}
    for stage in pair.dense.stages[len(head) :]:
        twin = pair.sparse.stages[pair.shared[stage.number] - 1]
        begin = {"model": str(head[-1].result)} if head else {"model": pair.dense.start["model"]}
        found: dict[str, Any] = {}
        for arm, args in ((SPARSE, pair.sparse.arguments(twin)), (DENSE, pair.dense.arguments(stage, **begin))):
            found[arm] = counted(folder / FLOPS_NAME, args, f"{arm} {pair.seed} {twin.name}", step_flops)
        steps = max(1, round(on_main(lambda twin=twin: steps_taken(twin)) * found[SPARSE] / found[DENSE]))  # type: ignore[misc]
        stages.append(replace(stage, settings=stage.settings | {"max_steps": steps}))
        told[twin.name] = found
    return replace(pair, dense=replace(pair.dense, stages=tuple(stages))), told
