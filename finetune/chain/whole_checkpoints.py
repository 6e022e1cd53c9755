"""Which of a run's checkpoints are whole: `checkpoint_files.json`, written last of all, names every file and its size.

A run that is killed while it writes a checkpoint, or removes an old one, leaves a folder that looks like one. The host
goes on from the folder with the highest number (transformers 5.23), whatever is in it.
"""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

FILES_NAME = "checkpoint_files.json"
OF_DEEPSPEED = "global_step"  # the folder of its optimizer


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, also for who kills the process meanwhile."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_sizes(folder: Path) -> dict[str, int]:
    """The size of every file below a folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def mark_whole(folder: Path) -> None:
    """Writes down what a checkpoint consists of."""
    sizes = {name: size for name, size in file_sizes(folder).items() if name != FILES_NAME}
    write_atomically(folder / FILES_NAME, json.dumps(sizes, indent=1) + "\n")


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint is as it was when its writing ended, and a run can go on from it; files that were added
    since do not matter.
    """
    try:
        sizes = json.loads((folder / FILES_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    found = file_sizes(folder)
    has_state = any(name == SCHEDULER_NAME or name.startswith(OF_DEEPSPEED) for name in sizes)  # not save_only_model
    return has_state and all(found.get(name) == size for name, size in sizes.items())


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 for another folder."""
    prefix, _, step = folder.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else -1


def would_be_overrun(folder: Path) -> bool:
    """Whether a run that goes on from a checkpoint would take a step too many: the host (transformers 5.23) looks at
    `max_steps` behind a step alone, so one that has come to its end in the middle of an epoch takes another.
    """
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return False
    state = TrainerState.load_from_json(str(path))
    return state.global_step >= state.max_steps and (state.epoch or 0) % 1 > 0


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of a run that came furthest, of those it can go on from; None where there is none."""
    named = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0]
    found = [path for path in named if is_whole(path) and not would_be_overrun(path)]
    return max(found, key=step_of, default=None)


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint once it is whole. The last of a trainer's callbacks, since others write into it too."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every process has written its share when the first one looks."""
        PartialState().wait_for_everyone()
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            mark_whole(folder)
