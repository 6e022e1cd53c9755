"""What a chain that is run again empties: folders of its own stages, and never what it reads or what others put there.

Checked before anything is removed, as `run_folder` does for a run of one stage.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modeling_vlmoe.companions import RECEIPT_NAME

from ..data_formats.checks import sources_of
from ..data_formats.tars import IMAGE_SUFFIXES
from ..run_folder import is_inside
from ..settings import SETTINGS_NAME
from ..training_data import ChatStream
from .record import BEGUN, Record
from .stages import PARENTS, Chain

# What of a training stage's settings names files that it reads.
READ = ("data", "eval_data", "image_folder", "deepspeed")
# One of them is in every folder that a stage of ours has finished.
MARKS = (SETTINGS_NAME, RECEIPT_NAME)


def emptied_folders(chain: Chain, record: Record, num_finished: int) -> tuple[Path, ...]:
    """The folders that are there and are emptied where a chain goes on behind some stages.

    Args:
        chain: parsed.
        record: of its folder.
        num_finished: stages that are kept.
    """
    if chain.is_begun_only and num_finished == len(chain.stages):
        return ()
    names = [entry.folder for entry in record.entries[num_finished:]]
    names += [stage.folder.name for stage in chain.stages[num_finished:]]
    return tuple(path for name in dict.fromkeys(names) if os.path.lexists(path := chain.output_dir / name))


def read_paths(chain: Chain) -> Iterator[tuple[str, str]]:
    """Everything that a chain reads and that has a path here, after what it is called."""
    named = [(name, chain.start.get(name)) for name in ("model", *PARENTS)]
    named += chain.reads.items()
    for stage in chain.stages:
        if stage.upcycle is None:
            args = chain.arguments(stage)
            named += [(name, one) for name in READ for one in _texts(getattr(args, name))]
    for name, given in named:
        if given is not None and Path(str(given)).expanduser().exists():
            yield name, str(given)


def _texts(value: Any) -> list[str]:
    return sources_of(value) if isinstance(value, (str, list)) else []


def held_input(chain: Chain, folders: Sequence[Path]) -> tuple[str, str, Path] | None:
    """The first thing that a chain reads and that lies in one of some folders: its name, its path and the folder."""
    if not folders:
        return None
    for name, given in read_paths(chain):
        for folder in folders:
            if is_inside(Path(given).expanduser(), folder):
                return name, given, folder
    return None


def check_may_be_emptied(chain: Chain, record: Record, folders: Sequence[Path]) -> None:
    """Refuses to empty folders that hold what the chain reads, or that no stage has filled.

    Raises:
        ValueError: naming the folder and what is in it.
    """
    if (held := held_input(chain, folders)) is not None:
        name, given, folder = held
        raise ValueError(
            f"Running the stages again would delete {folder}, which holds the {name} {given}; name another output_dir."
        )
    begun = {entry.folder for entry in record.entries if entry.state == BEGUN}
    for folder in folders:
        if folder.is_dir() and (
            folder.name in begun or not any(folder.iterdir()) or any((folder / mark).is_file() for mark in MARKS)
        ):
            continue
        raise ValueError(
            f"{folder} is in the place of a stage, but no stage has written it: only what a run has left is emptied, "
            f"and it has no {' or '.join(MARKS)}. Remove it yourself, or name another output_dir."
        )


def check_images_stay(rows: Any, folders: Sequence[Path]) -> None:
    """Refuses to empty folders that hold the data's images; of a stream, any images, as its rows are not known.

    Args:
        rows: as `load_datasets` gives them.
        folders: that would be emptied.

    Raises:
        ValueError: naming the first image.
    """
    for image in _stored_images(rows, folders):
        for folder in folders:
            if is_inside(image, folder):
                raise ValueError(
                    f"Running the stages again would delete {folder}, which holds {image}, an image of the data or "
                    "one that may be; name another output_dir."
                )


def _stored_images(rows: Any, folders: Sequence[Path]) -> Iterator[str]:
    """Paths of images: of rows those they name, of a stream those in the folders."""
    if not folders or rows is None:
        return
    if isinstance(rows, ChatStream):
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES:
                    yield str(path)
        return
    for row in rows.select_columns(["images"]):
        yield from (image["path"] for image in row["images"] if image["bytes"] is None)
