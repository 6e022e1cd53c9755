"""A batch to plan with, made by the model's own processor: of a picture and a text of the sizes that are asked for, or
of the row of the data that makes the largest one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .collator import IGNORED, ChatCollator

Batch = dict[str, Tensor]


def example_row(num_images: int, image_size: tuple[int, int]) -> dict[str, Any]:
    """A question and its answer on pictures of a width and a height."""
    parts = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It is red."}]
    return {"messages": messages, "images": [Image.new("RGB", image_size, "red") for _ in range(num_images)]}


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


def example_batch(processor: Any, batch_size: int, length: int, num_images: int, image_size: tuple[int, int]) -> Batch:
    """A batch of rows that are alike.

    Args:
        processor: the model's.
        batch_size: rows.
        length: tokens of each, those of images counted.
        num_images: images of each.
        image_size: their width and height.

    Raises:
        ValueError: if so few tokens cannot hold the images.
    """
    one = ChatCollator(processor)([example_row(num_images, image_size)])
    return repeated(lengthen(one, length), batch_size)


def longest_row(rows: Sequence[Mapping[str, Any]]) -> int:
    """The index of the row with the most images, and of these of the one with the most text: about the largest."""

    def size(row: Mapping[str, Any]) -> tuple[int, int]:
        texts = [message["content"] for message in row["messages"]]
        texts = [part for text in texts for part in ([text] if isinstance(text, str) else text)]
        words = [part if isinstance(part, str) else (part.get("text") or "") for part in texts]
        return len(row["images"] or []), sum(map(len, words))

    return max(range(len(rows)), key=lambda index: size(rows[index]))


def largest_batch(processor: Any, rows: Any, batch_size: int) -> Batch:
    """About the largest batch of some data: as many rows as the largest one.

    Args:
        processor: the model's.
        rows: as `load_chat_data` gives them, or a list of them.
        batch_size: rows of a batch.
    """
    slim = rows.select_columns(["messages", "images"]) if hasattr(rows, "select_columns") else rows  # quicker to read
    return repeated(ChatCollator(processor)([rows[longest_row(slim)]]), min(batch_size, len(rows)))
