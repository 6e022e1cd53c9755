"""Where a chain goes on: finished stages are kept, one that was interrupted goes on from its last checkpoint."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from modeling_vlmoe.weight_fingerprint import fingerprint

from .emptied import check_may_be_emptied, emptied_folders, held_input
from .record import FINISHED, RECORD_NAME, Entry, Record, describe_stage, differences, read_record, write_record
from .seen_records import why_unseen
from .stages import Chain, Stage
from .whole_checkpoints import last_whole_checkpoint

# What an interrupted run has left that the resumed one goes on with, beside its last checkpoint.
KEPT = ("runs", "seen_batches*.jsonl")


@dataclass(frozen=True)
class Start:
    """Where a chain goes on.

    Attributes:
        num_finished: stages that are kept.
        checkpoint: of the next stage, to go on from; None to begin it.
        emptied: folders that are emptied before, those of which nothing or only the checkpoint is kept.
    """

    num_finished: int
    checkpoint: str | None = None
    emptied: tuple[Path, ...] = ()


def check_is_ours(folder: Path) -> None:
    """Refuses an output folder that another command has filled.

    Raises:
        ValueError: naming it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder.")
    if not folder.is_dir() or (folder / RECORD_NAME).is_file():
        return
    if others := sorted(path.name for path in folder.iterdir() if not is_unfinished(path)):
        raise ValueError(
            f"output_dir {folder} holds {', '.join(others[:3])}, but no {RECORD_NAME}: no chain was run there. "
            "Name another folder, or empty it yourself."
        )


def is_unfinished(path: Path) -> bool:
    """Whether a path is what a killed chain leaves of a file or folder that it was writing."""
    return path.name.startswith(".") and ".partial" in path.name


def changes_since(result: Path, weights: str | None) -> list[str]:
    """What became of a finished stage's result, in words; nothing where it is as it was."""
    try:
        found = fingerprint(result)
    except ValueError:
        return [f"its result {result} was damaged since"]
    if found is None:
        return [f"its result {result} was removed since"]
    return [] if found == weights else [f"its result {result} was changed since"]


def check_all_are_told(chain: Chain, record: Record) -> None:
    """Refuses a recipe that ends before what is recorded, whose further stages would be lost.

    Raises:
        ValueError: naming those stages, unless they may be removed.
    """
    further = [entry.name for entry in record.entries[len(chain.stages) :]]
    if further and not chain.force and not chain.is_begun_only:
        raise ValueError(
            f"{chain.output_dir} holds {', '.join(further)} too, behind {chain.stages[-1].name}, the last stage of "
            f"{chain.origin}. Give the recipe with all its stages, or another output_dir; force=true removes what is "
            "not in the recipe."
        )


def find_start(chain: Chain) -> Start:
    """Compares a chain with what is recorded in its folder, and changes nothing.

    Raises:
        ValueError: if a stage was run with other settings, or its result was changed since; and if what would be
            emptied holds what the chain reads, or was written by nobody of ours.
    """
    check_is_ours(chain.output_dir)
    record = read_record(chain.output_dir)
    start = compare(chain, record)
    folders = emptied_folders(chain, record, start.num_finished)
    check_may_be_emptied(chain, record, folders)
    return replace(start, emptied=folders)


def compare(chain: Chain, record: Record) -> Start:
    """Goes along what is recorded up to the first stage that is not finished, or with `force` not as it was.

    Raises:
        ValueError: if a stage is not as it was.
    """
    for number, (stage, entry) in enumerate(zip(chain.stages, record.entries, strict=False)):
        is_finished = entry.state == FINISHED
        checkpoint = last_whole_checkpoint(stage.folder) if not is_finished and stage.upcycle is None else None
        why = differences(entry, describe_stage(chain, stage))
        if not why and is_finished:
            why = changes_since(stage.result, entry.weights)
        if not why and (is_finished or checkpoint is not None):
            why = why_unseen(chain, stage, checkpoint)
        if why and not chain.force:
            raise ValueError(refusal(chain, stage, entry, why, emptied_folders(chain, record, number)))
        if why:
            return Start(number)
        if not is_finished:
            return Start(number, None if checkpoint is None else str(checkpoint))
    check_all_are_told(chain, record)
    return Start(min(len(chain.stages), len(record.entries)))


def refusal(chain: Chain, stage: Stage, entry: Entry, why: list[str], folders: tuple[Path, ...]) -> str:
    """Why a stage is not gone on with; `force` is advised where it would delete nothing that the chain reads."""
    was = "has finished" if entry.state == FINISHED else "was begun"
    said = (
        f"Stage {stage.name} {was} in {chain.output_dir}, but {'; '.join(why)}. Give what it was run with, or another "
        "output_dir"
    )
    if held_input(chain, folders) is not None:
        return f"{said}."
    return f"{said}; force=true runs it and all behind it again."


def remove(path: Path) -> None:
    """Removes a folder, or a link to one."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def clear(folder: Path, stage_folder: Path) -> None:
    """Removes a stage's folder, and what a killed conversion has left beside it. It is renamed first, so that who is
    killed meanwhile leaves no part of it in its place.
    """
    for path in folder.glob(f".{stage_folder.name}.*-*"):
        remove(path)
    if stage_folder.is_symlink() or stage_folder.exists():
        remove(stage_folder.rename(folder / f".{stage_folder.name}.partial-removed"))


def keep_for_resuming(stage: Stage, checkpoint: str) -> None:
    """Leaves of an interrupted stage the checkpoint it goes on from, and logs. The rest may be half-written."""
    kept = {path for pattern in KEPT for path in stage.folder.glob(pattern)} | {Path(checkpoint)}
    for path in stage.folder.iterdir():
        if path in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def make_ready(chain: Chain, start: Start) -> Record:
    """Makes the folder what the next stage begins in, and drops what is not kept.

    Returns:
        The record of what is kept.
    """
    chain.output_dir.mkdir(parents=True, exist_ok=True)
    record = read_record(chain.output_dir)
    if chain.is_begun_only and start.num_finished == len(chain.stages):
        return record
    dropped = record.entries[start.num_finished :]
    kept = Record(record.entries[: start.num_finished], record.result)
    if start.checkpoint is not None:
        dropped = dropped[1:]
        kept.entries.append(record.entries[start.num_finished])
    if start.num_finished < len(chain.stages):
        kept.result = None
    else:
        kept.result = kept.entries[-1].result
    if dropped or record.result != kept.result:
        write_record(chain.output_dir, kept)  # before anything of it is removed
    for entry in dropped:
        clear(chain.output_dir, chain.output_dir / entry.folder)
    if start.checkpoint is not None:
        keep_for_resuming(chain.stages[start.num_finished], start.checkpoint)
    return kept
