"""An output folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME


def check_output_folder(folder: Path, force: bool) -> None:
    """Refuses a target that cannot be made or renamed, and one that is not empty (forced: one that is no model)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file. Name a folder.")
    if os.path.ismount(folder):
        raise ValueError(f"--output-dir {folder} is a mount point, which cannot be renamed. Name a folder inside it.")
    existing = next(parent for parent in folder.resolve().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"--output-dir {folder} is below {existing}, which is a file. Name another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"--output-dir {folder} cannot be made: there is no permission to write into {existing}. Name another."
        )
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not force:
        raise ValueError(f"--output-dir {folder} is not empty. Name another folder, or pass --force to replace it.")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"--output-dir {folder} is not empty and has no {CONFIG_NAME}: --force replaces model folders only. "
            "Name another folder, or empty it yourself."
        )


def check_parents_survive(folder: Path, parents: Iterable[Path]) -> None:
    """Refuses a target that is, or that holds, one of the parents' folders or files (symbolic links followed)."""
    target = folder.resolve()
    for parent in parents:
        if target in (parent.resolve(), *parent.resolve().parents):
            raise ValueError(
                f"--output-dir {folder} is or holds the parent {parent}, which would be overwritten. "
                "Name another folder."
            )


@contextmanager
def whole_or_nothing(folder: Path, force: bool = False) -> Iterator[Path]:
    """Gives a temporary sibling of `folder` to write into; it takes its place when all went well, else it goes.

    Raises:
        ValueError: when meanwhile somebody has written what may not be replaced.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        check_output_folder(folder, force)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuses early what the disk cannot hold.

    Raises:
        ValueError: naming how much is needed and free.
    """
    existing = next(parent for parent in folder.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(
            f"--output-dir {folder} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free. "
            "Make room, or name a folder on another disk."
        )
