"""The folder that a run writes into: what may be there, what a resumed run goes on from, and how it is emptied."""

import errno
import shutil
from pathlib import Path

from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from .arguments import FinetuneArguments
from .data_formats.checks import sources_of
from .settings import SETTINGS_NAME


def is_inside(path: str | Path, folder: Path) -> bool:
    """Whether emptying a folder would remove a path."""
    path, folder = Path(path).resolve(), folder.resolve()
    return folder in (path, *path.parents)


def check_output_folder(args: FinetuneArguments) -> None:
    """Refuses a result folder that holds something else, and a resume where there is nothing to resume.

    Raises:
        ValueError: saying which.
    """
    folder, checkpoint = args.folder, resume_point(args)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder.")
    for name in ("model", "data", "eval_data"):
        for given in sources_of(getattr(args, name) or []):
            if Path(given).exists() and is_inside(given, folder):
                raise ValueError(f"output_dir {folder} is or holds the {name} {given}; name another folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if args.force:
        check_may_be_emptied(args, checkpoint)
    elif checkpoint is None or not is_inside(checkpoint, folder):
        raise ValueError(
            f"output_dir {folder} is not empty. Name another folder, give resume_from_checkpoint=true to continue its "
            "own run, or force=true to empty what a run has left."
        )


def check_may_be_emptied(args: FinetuneArguments, checkpoint: str | None) -> None:
    """Refuses to empty a folder that is not a run's, or that holds what this run starts from."""
    folder = args.folder
    if not (folder / SETTINGS_NAME).is_file():
        raise ValueError(
            f"force=true empties only what a run has left, but output_dir {folder} has no {SETTINGS_NAME}. Name "
            "another folder, or empty it yourself."
        )
    for name, path in (("recipe", args.recipe), ("checkpoint to continue from", checkpoint)):
        if path is not None and is_inside(path, folder):
            raise ValueError(
                f"force=true would delete the {name} {path}; name another output_dir, or leave force out."
            )


def check_images_stay(args: FinetuneArguments, rows: Dataset) -> None:
    """Refuses to empty a folder that holds the data's images."""
    for row in rows.select_columns(["images"]):
        for image in row["images"]:
            if image["bytes"] is None and is_inside(image["path"], args.folder):
                raise ValueError(
                    f"force=true would delete {image['path']}, an image of the data; name another output_dir."
                )


def make_folder(folder: Path) -> None:
    """Makes the result's folder, before the weights are read.

    Raises:
        ValueError: if it cannot be, unless for want of space.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ValueError(f"output_dir {folder} cannot be made: {error.strerror}. Name another folder.") from error


def empty_folder(folder: Path) -> None:
    """Removes all that is in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def resume_point(args: FinetuneArguments) -> str | None:
    """The checkpoint to continue from: "true" stands for the last one in the output folder.

    Raises:
        ValueError: if it is not there.
    """
    given = args.resume_from_checkpoint
    if given is None or str(given).lower() in ("no", "false"):
        return None
    if str(given).lower() != "true":
        if not Path(given).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {given}, but there is no such folder; give one of the run's checkpoints, "
                "or true for the last."
            )
        return str(given)
    last = get_last_checkpoint(str(args.folder)) if args.folder.is_dir() else None
    if last is None:
        raise ValueError(
            f"resume_from_checkpoint is on, but {args.output_dir} holds no checkpoint; leave it out to begin anew."
        )
    return last
