"""A batch to plan with, made by the model's own processor: of a picture and a text of the sizes that are asked for, or
of the rows of the data that make the largest one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .collator import IGNORED, ChatCollator, count_tokens
from .image_files import image_size
from .rows import where_is

Batch = dict[str, Tensor]
Row = Mapping[str, Any]
NUM_RANKED = 64  # rows with the most text, and with the most images, that are looked at closely
NUM_SAMPLED = 256  # further ones, of all over the data


def example_row(num_images: int, size: tuple[int, int]) -> dict[str, Any]:
    """A question and its answer on pictures of a width and a height."""
    parts = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It is red."}]
    return {"messages": messages, "images": [Image.new("RGB", size, "red") for _ in range(num_images)]}


def lengthen(batch: Batch, length: int) -> Batch:
    """A batch of one row with more of its last token, all of them to be learnt.

    Args:
        batch: the inputs, those of tokens (1, sequence).
        length: the new sequence.

    Raises:
        ValueError: if it is longer already.
    """
    shape = batch["input_ids"].shape
    if (missing := length - shape[1]) < 0:
        raise ValueError(
            f"length is {length}, but a question, its answer and the images' tokens are {shape[1]} tokens; give that "
            "or more, or smaller or fewer images."
        )
    longer = {}
    for name, value in batch.items():
        is_of_tokens = value.shape[:2] == shape and value.ndim == 2
        longer[name] = torch.cat([value, value[:, -1:].expand(-1, missing)], dim=1) if is_of_tokens else value
    longer["labels"] = longer["labels"].masked_fill(longer["labels"] == IGNORED, IGNORED)
    longer["labels"][:, shape[1] :] = longer["input_ids"][:, shape[1] :]
    return longer


def repeated(batch: Batch, times: int) -> Batch:
    """A batch of so many times its rows; images are in a row too."""
    return {name: torch.cat([value] * times) for name, value in batch.items()}


def example_batch(processor: Any, batch_size: int, length: int, num_images: int, size: tuple[int, int]) -> Batch:
    """A batch of rows that are alike.

    Args:
        processor: the model's.
        batch_size: rows.
        length: tokens of each, those of images counted.
        num_images: images of each.
        size: their width and height.

    Raises:
        ValueError: if so few tokens cannot hold the images.
    """
    one = ChatCollator(processor)([example_row(num_images, size)])
    return repeated(lengthen(one, length), batch_size)


def has_images(batch: Batch) -> bool:
    """Whether there is more in a batch than text."""
    return num_pixels(batch) > 0


def num_pixels(batch: Batch) -> int:
    """How many numbers of a batch are no tokens."""
    return sum(value.numel() for value in batch.values() if value.is_floating_point())


def _num_letters(row: Row) -> int:
    texts = [message["content"] for message in row["messages"]]
    parts = [part for text in texts for part in ([text] if isinstance(text, str) else text)]
    return sum(len(part if isinstance(part, str) else (part.get("text") or "")) for part in parts)


def _area(row: Row) -> int:
    sizes = [image_size(image, where_is(row)) for image in row["images"] or []]
    return sum(width * height for width, height in sizes)


def largest_rows(processor: Any, rows: Sequence[Row]) -> tuple[int, int]:
    """The indices of the row with the most tokens and of that whose images make the most pixels, often the same one.

    Tokens are counted by the processor, the images' too. Of much data those rows are looked at that have the most
    letters or images, and some of all over it.

    Args:
        processor: the model's.
        rows: as `load_chat_data` gives them, or a list of them.
    """
    sizes = [(_num_letters(row), len(row["images"] or [])) for row in rows]
    ranked = [sorted(range(len(rows)), key=lambda index: -sizes[index][kind])[:NUM_RANKED] for kind in (0, 1)]
    looked_at = {*ranked[0], *ranked[1], *range(0, len(rows), -(-len(rows) // NUM_SAMPLED))}
    near = {index: rows[index] for index in sorted(looked_at)}
    longest = max(near, key=lambda index: count_tokens(near[index], processor))
    with_most = {
        longest,
        max(near, key=lambda index: len(near[index]["images"] or [])),
        max(near, key=lambda index: _area(near[index])),
    }
    collate = ChatCollator(processor)
    pixels = {index: num_pixels(collate([rows[index]])) for index in sorted(with_most)}
    heaviest = max(pixels, key=lambda index: (pixels[index], index == longest))
    return longest, heaviest


def largest_batch(processor: Any, rows: Any, batch_size: int) -> Batch:
    """About the largest batch of some data by its tokens: as many rows as the one with the most.

    Args:
        processor: the model's.
        rows: as `load_chat_data` gives them, or a list of them.
        batch_size: rows of a batch.
    """
    longest, _ = largest_rows(processor, slim(rows))
    return repeated(ChatCollator(processor)([rows[longest]]), min(batch_size, len(rows)))


def slim(rows: Any) -> Any:
    """Rows with what a batch is made of, which are quicker to read."""
    return rows.select_columns(["messages", "images"]) if hasattr(rows, "select_columns") else rows
