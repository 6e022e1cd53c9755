"""An output folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output_folder(folder: Path, force: bool, parents: Iterable[Path] = ()) -> None:
    """Refuses a target that is a file, that is one of the parents, or that is not empty (unless forced)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file.")
    target = folder.resolve()
    for parent in parents:
        if target == parent.resolve() or target in parent.resolve().parents:
            raise ValueError(f"--output-dir {folder} is or holds the parent {parent}, which would be overwritten.")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ValueError(f"--output-dir {folder} is not empty. Name another folder, or pass --force to replace it.")


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Gives a temporary sibling of `folder` to write into; it takes its place when all went well, else it goes."""
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
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
            f"--output-dir {folder} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free."
        )
