"""`seen_batches.jsonl`: a digest of every batch that a run has trained on, to show that two runs saw the same.

    {"step": 0, "digest": "9f2c...", "tokens": 168}

One line per micro-batch of this process; the digest is of all its tensors: tokens, masks, labels, pixels. A resumed
run keeps the lines up to the checkpoint that it goes on from.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SEEN_NAME = "seen_batches"


def seen_path(folder: Path, process: int = 0) -> Path:
    """The file of a process."""
    return folder / f"{SEEN_NAME}{f'-{process}' if process else ''}.jsonl"


def digest(inputs: Mapping[str, Any]) -> str:
    """What tells a batch from another: a hash of its tensors, by name."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        if isinstance(value := inputs[name], torch.Tensor):
            found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_seen(folder: Path, process: int = 0) -> list[dict[str, Any]]:
    """What a run has seen; a last line that a killed process did not end is left out."""
    path = seen_path(folder, process)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def read_all_seen(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What every process of a run has seen, by the name of its file."""
    names = sorted(path.stem.removeprefix(SEEN_NAME).removeprefix("-") for path in folder.glob(f"{SEEN_NAME}*.jsonl"))
    return {seen_path(folder, int(name or 0)).name: read_seen(folder, int(name or 0)) for name in names}


def covers(folder: Path, num_steps: int) -> bool:
    """Whether every process of a run has written down batches of all its first steps."""
    try:
        seen = read_all_seen(folder)
        return bool(seen) and all({line["step"] for line in lines} >= set(range(num_steps)) for lines in seen.values())
    except (ValueError, KeyError, TypeError):
        return False


class SeenBatches(TrainerCallback):
    """Drops, where a run begins or goes on, what was seen behind the step that it goes on from."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        folder = Path(str(args.output_dir))
        kept = [one for one in read_seen(folder, args.process_index) if one["step"] < state.global_step]
        text = "".join(f"{json.dumps(one)}\n" for one in kept)
        seen_path(folder, args.process_index).write_text(text, encoding="utf-8")


def record_batches(trainer: Trainer) -> None:
    """Makes a trainer write down every batch that it trains on."""
    step, path = trainer.training_step, seen_path(Path(str(trainer.args.output_dir)), trainer.args.process_index)

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = int(inputs["attention_mask"].sum())
        line = {"step": trainer.state.global_step, "digest": digest(inputs), "tokens": tokens}
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.add_callback(SeenBatches())
