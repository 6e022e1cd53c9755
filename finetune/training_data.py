"""The rows that a recipe trains and evaluates on: read before, or while it trains."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import FinetuneArguments
from .data import load_chat_data
from .data_formats.checks import reading_of, sources_of
from .data_formats.streams import ChatStream, load_chat_stream
from .settings import SETTINGS_NAME
from .sources import source_names
from .trained.checks import learns_from_images_alone

# What the order of a stream's rows, and how many of them a step takes, depend on, beside the size of a batch.
ORDERED_BY = (
    "streaming",
    "data",
    "data_weights",
    "train_split",
    "seed",
    "shuffle_buffer",
    "gradient_accumulation_steps",
)
NUM_ESTIMATED = 256  # rows at the beginning of a stream, by which its memory is estimated
FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process.*\n\S*(?:Fault|Error): ", re.DOTALL)


def load_rows(
    args: FinetuneArguments, source: str | list[str], split: str, weights: list[float] | None = None
) -> Dataset:
    """All rows of a source, as the recipe says they are read; of several once each, but where they have weights.

    Raises:
        ValueError: naming the row that is wrong.
    """
    return load_chat_data(
        source,
        split,
        **asdict(reading_of(args)),
        weights=weights,
        seed=args.seed,
    )


def load_datasets(args: FinetuneArguments) -> tuple[Any, Dataset | None]:
    """The rows to train and to evaluate on; with `streaming` the first are a `ChatStream`.

    Raises:
        ValueError: naming the row that is wrong.
    """
    train = open_stream(args) if args.streaming else load_rows(args, args.data, args.train_split, args.data_weights)
    if args.eval_data is not None:
        return train, load_rows(args, args.eval_data, args.eval_split or "test")
    if args.eval_split is not None:
        if isinstance(args.data, str) and Path(args.data).is_file():
            raise ValueError(
                f"eval_split is {args.eval_split}, but data is the single file {args.data}; give eval_data."
            )
        return train, load_rows(args, args.data, args.eval_split)
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise ValueError("eval_strategy is on, but there is nothing to evaluate on; give eval_data or eval_split.")
    return train, None


def open_stream(args: FinetuneArguments) -> ChatStream:
    """The rows of `data`, to be read while training.

    Raises:
        ValueError: if they cannot be.
    """
    rows = load_chat_stream(
        args.data,
        args.train_split,
        **asdict(reading_of(args)),
        weights=args.data_weights,
        seed=args.seed,
        buffer=args.shuffle_buffer,
    )
    return ChatStream(rows, args.train_batch_size * args.world_size, needs_images=learns_from_images_alone(args))


def go_on(stream: ChatStream, args: FinetuneArguments, checkpoint: str | None) -> None:
    """Sets a stream to the row behind the last that an interrupted run has trained on.

    Raises:
        ValueError: if that run read the rows in another order or in batches of another size, or does not say how far
            it came.
    """
    if checkpoint is None:
        return
    path = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        steps, batch_size = int(state["global_step"]), state["train_batch_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say how far the run came: {error!r}. Give another checkpoint.") from error
    if batch_size != args.train_batch_size:
        raise ValueError(
            f"The run in {checkpoint} had batches of {batch_size} rows a process, but they are of "
            f"{args.train_batch_size}, so the stream cannot go on where it was; give the per_device_train_batch_size "
            "of then."
        )
    check_same_order(args, Path(checkpoint))
    stream.first_row = steps * args.gradient_accumulation_steps * stream.rows_per_batch


def _settings_of(run: Path) -> dict[str, Any]:
    """The settings that a run has written.

    Raises:
        ValueError: if there are none.
    """
    path = run / SETTINGS_NAME
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), so nobody knows in which order the stream was read; give a checkpoint "
            "in the folder of its run."
        ) from error
    return settings if isinstance(settings, dict) else {}


def _num_processes(checkpoint: Path) -> int | None:
    """How many processes have left the state of their random numbers in a checkpoint; None: none has."""
    num_found = len(list(checkpoint.glob("rng_state_*.pth")))
    return num_found or (1 if (checkpoint / "rng_state.pth").is_file() else None)


def check_same_order(args: FinetuneArguments, checkpoint: Path) -> None:
    """Refuses to go on with a stream whose rows would come in another order than in the interrupted run.

    Raises:
        ValueError: saying what differs.
    """
    then, defaults = _settings_of(checkpoint.parent), {item.name: item.default for item in fields(args)}
    for name in ORDERED_BY:
        before, here = then.get(name, defaults[name]), getattr(args, name)
        if name == "data":  # it may lie in another folder
            before, here = (source_names(sources_of(one)) for one in (before or "", here))
        if before != here:
            raise ValueError(
                f"The run in {checkpoint} had {name}={before}, but it is {here}, so the stream cannot go on where it "
                f"was; give the {name} of then."
            )
    # Of several machines without a common disk each has the states of its own processes.
    known = (None, args.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))
    if (num_then := _num_processes(checkpoint)) not in known:
        raise ValueError(
            f"The run in {checkpoint} had {num_then} processes, but there are {args.world_size}, so the stream cannot "
            "go on where it was; give as many as then."
        )


def num_rows(dataset: Any) -> int | None:
    """How many rows there are; None of a stream, of which nobody knows."""
    return None if isinstance(dataset, ChatStream) else len(dataset)


def rows_to_estimate(dataset: Any) -> Any:
    """The rows by which the memory of a run is estimated."""
    return dataset.first(NUM_ESTIMATED) if isinstance(dataset, ChatStream) else dataset


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Within it a row's error from a DataLoader's worker is said as without workers, its traceback left out.

    Raises:
        ValueError: in its place.
    """
    try:
        yield
    except ValueError as error:
        if not (found := FROM_WORKER.match(str(error))):
            raise
        raise ValueError(str(error)[found.end() :].strip()) from error
