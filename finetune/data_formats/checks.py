"""What is checked of a recipe's settings of data, before anything is read."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.trainer_pt_utils import AcceleratorConfig

from .mixtures import probabilities
from .reading import Reading

if TYPE_CHECKING:
    from ..arguments import FinetuneArguments


def sources_of(data: str | list[str]) -> list[str]:
    """One source or several, as several."""
    return [data] if isinstance(data, str) else list(data)


def split_sources(data: str) -> list[str]:
    """The sources in a word of a command line: one whose name may have a comma, or several with commas between."""
    return [data] if Path(data).exists() else [part.strip() for part in data.split(",")]


def reading_of(args: Any) -> Reading:
    """How a recipe's rows are read, or those of another command with the same settings.

    Raises:
        ValueError: for an unknown form, or an empty question.
    """
    return Reading(args.data_format, args.image_folder, args.question)


def check_data_settings(args: "FinetuneArguments") -> None:
    """Refuses settings of data that do not go together, and settles what the host has to know of a stream.

    Raises:
        ValueError: saying which.
    """
    if isinstance(args.data, list) and len(args.data) == 1:
        args.data = args.data[0]
    sources = sources_of(args.data)
    reading_of(args)
    if args.data_weights:
        if len(sources) == 1:
            raise ValueError("data_weights are for several data; name them, or leave data_weights out.")
        probabilities(args.data_weights, sources)
    if args.eval_data is not None and len(split_sources(args.eval_data)) > 1:
        raise ValueError(
            f"eval_data is {args.eval_data}, but it takes one source; name one, or use eval_split of several data."
        )
    if args.shuffle_buffer < 0:
        raise ValueError(f"shuffle_buffer is {args.shuffle_buffer}; expected 0 (rows in their order) or more.")
    if not args.streaming:
        if args.shuffle_buffer != type(args).shuffle_buffer:
            raise ValueError(
                f"shuffle_buffer is {args.shuffle_buffer}, but only streams have a buffer; give streaming=true, or "
                "leave it out."
            )
        return
    if args.max_steps < 1:
        raise ValueError("streaming is on, but nobody knows how long a stream is; give max_steps.")
    if len(sources) > 1 and not args.data_weights:
        raise ValueError(
            f"streaming is on for {len(sources)} data, of which nobody knows how long they are; give data_weights."
        )
    args.ignore_data_skip = True  # the stream itself goes on where an interrupted run was; see `open_stream`
    # By default process 0 would read for all, and cut up one batch whose rows are padded alike.
    cast(AcceleratorConfig, args.accelerator_config).dispatch_batches = False
