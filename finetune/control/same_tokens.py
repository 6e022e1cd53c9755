"""The control has seen the same batches in the same order, or is refused: digests of both runs, side by side."""

from collections.abc import Iterator
from typing import Any

from accelerate import PartialState

from ..chain.stages import Stage
from .arms import Pair
from .seen_batches import SEEN_NAME, read_all_seen


def twins(pair: Pair) -> Iterator[tuple[Stage, Stage]]:
    """Every stage of the control that trains, behind the one that it stands for."""
    for stage in pair.dense.stages:
        if stage.upcycle is None:
            yield pair.sparse.stages[pair.shared[stage.number] - 1], stage


def check_processes(pair: Pair) -> None:
    """Refuses a control by another number of processes than the model's, before it is trained.

    Raises:
        ValueError: naming the stage and both numbers.
    """
    for twin, stage in twins(pair):
        num_processes = len(read_all_seen(stage.folder)) or PartialState().num_processes
        if num_processes != (own := len(read_all_seen(twin.folder))):
            raise ValueError(
                f"The model was trained by {own} processes in stage {twin.name}, its control by {num_processes}, "
                "which see other batches; train both by the same number."
            )


def check_same_tokens(pair: Pair, is_matched: bool) -> None:
    """Compares what both saw, stage by stage and process by process.

    Args:
        pair: both chains, trained.
        is_matched: whether the control took other steps, so that it saw more or less of the same.

    Raises:
        ValueError: naming the stage and the step at which they saw something else, or the run that does not say.
    """
    for twin, stage in twins(pair):
        every_sparse, every_dense = read_all_seen(twin.folder), read_all_seen(stage.folder)
        for own, seen in ((twin, every_sparse), (stage, every_dense)):
            if not seen or not all(seen.values()):
                raise ValueError(
                    f"Nothing says which batches stage {own.name} saw in {own.folder}: it has no {SEEN_NAME}.jsonl, "
                    "or an empty one. Give force=true to train it again, or another output_dir."
                )
        check_processes(pair)
        for name, sparse in every_sparse.items():
            compare_seen(sparse, every_dense[name], twin.name, is_matched)


def compare_seen(sparse: list[dict[str, Any]], dense: list[dict[str, Any]], stage: str, is_matched: bool) -> None:
    """Compares what one process saw of both.

    Raises:
        ValueError: naming the step at which it is not the same.
    """
    if not is_matched and len(sparse) != len(dense):
        raise ValueError(
            f"The control took {len(dense)} batches in stage {stage}, the model {len(sparse)}; give both the same "
            "steps: leave them out of the stage's `control:`."
        )
    for mine, its in zip(sparse, dense, strict=not is_matched):
        if mine["digest"] != its["digest"]:
            raise ValueError(
                f"The control saw other tokens than the model in stage {stage}, from step {mine['step'] + 1} on; give "
                "both the same data, batch size, seed and processor."
            )
