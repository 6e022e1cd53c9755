"""Rows of chat data become batches: text and images in the model's form, labels on what the assistant says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers.utils import logging as host_logging

from .data import ROW, open_image

IGNORED = -100


def where_is(row: Mapping[str, Any]) -> str:
    """What messages call a row."""
    return f"Row {row[ROW]} of the data" if row.get(ROW) is not None else "A row of the data"


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's messages with its opened images in their places.

    Raises:
        ValueError: naming the row, if an image cannot be read or the counts differ.
    """
    where = where_is(row)
    images = iter([open_image(image, where) for image in row.get("images") or []])
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [_with_image(part, images, where) for part in content]
        messages.append({"role": message["role"], "content": content})
    if next(images, None) is not None:
        raise ValueError(f"{where} has more images than image parts in its messages; give one per image.")
    return messages


def _with_image(part: Mapping[str, Any], images: Iterable[Any], where: str) -> dict[str, Any]:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    image = next(iter(images), None)
    if image is None:
        raise ValueError(f"{where} has fewer images than image parts in its messages; give one per part.")
    return {"type": "image", "image": image}


def check_text(row: Mapping[str, Any], image_token: str) -> None:
    """Refuses a text that would be read as an image, and a row of empty answers.

    Raises:
        ValueError: naming the row.
    """
    is_answered = False
    for message in row["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text" and image_token in part["text"]:
                raise ValueError(
                    f"{where_is(row)} has {image_token} in its text, which the model reads as an image; write it "
                    'otherwise, or give an image by {"type": "image"}.'
                )
            is_answered |= message["role"] == "assistant" and (part["type"] != "text" or bool(part["text"].strip()))
    if not is_answered:
        raise ValueError(f"{where_is(row)} has no answer of the assistant that is not empty; give one.")


@dataclass
class ChatCollator:
    """Renders, tokenises and pads rows; labels are the assistant's tokens, its end of turn included.

    Text-only rows and rows with one or several images may share a batch.

    Attributes:
        processor: the model's; its chat template marks what the assistant says.
        max_length: the longest sample allowed, image tokens counted; nothing is ever cut.
        padding_side: right for training, left where answers are generated.
    """

    processor: Any
    max_length: int | None = None
    padding_side: str = "right"

    def prompts(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The rows up to the last answer, which is left for the model to give."""
        return self._encode([conversation(row)[:-1] for row in rows], add_generation_prompt=True)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A training batch: the model's inputs and `labels`, (batch, sequence), -100 where there is no target.

        Raises:
            ValueError: naming the row, for an unreadable image, a sample that is too long or one without a target.
        """
        for row in rows:
            check_text(row, self.processor.image_token)
        batch = self._encode([conversation(row) for row in rows], return_assistant_tokens_mask=True)
        said = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        said &= batch["input_ids"] != self.processor.image_token_id
        for row, length, targets in zip(rows, batch["attention_mask"].sum(-1), said.sum(-1), strict=True):
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"{where_is(row)} is {length} tokens long, beyond max_length {self.max_length}. Images are never "
                    "cut: shorten the text, leave the row out, or raise max_length."
                )
            if not targets:
                raise ValueError(
                    f"{where_is(row)} has no token of the assistant to learn: its answers hold reasoning alone, or "
                    "the processor's chat template has no generation marks. "
                    "Leave the row out, or build the processor by from_parents."
                )
        batch["labels"] = batch["input_ids"].masked_fill(~said, IGNORED)
        return batch

    def _encode(self, conversations: list[list[dict[str, Any]]], **kwargs: Any) -> dict[str, Tensor]:
        encoded = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": self.padding_side},
            **kwargs,
        )
        return dict(encoded)


def count_tokens(row: Mapping[str, Any], processor: Any) -> int:
    """A row's tokens, image tokens counted; images are opened only where each has a number of tokens of its own."""
    text = processor.apply_chat_template(row["messages"], tokenize=False)
    has_bos = processor.tokenizer.bos_token is not None and text.startswith(processor.tokenizer.bos_token)
    length = len(processor.tokenizer(text, add_special_tokens=not has_bos)["input_ids"])
    images = [partial(open_image, image, where_is(row)) for image in row["images"] or []]
    return length + processor.count_image_tokens(images) - len(images)


def check_rows(
    dataset: Iterable[Mapping[str, Any]],
    processor: Any,
    max_length: int | None = None,
    needs_images: bool = False,
) -> None:
    """Goes once over all rows, before any is trained on, without opening an image.

    Args:
        dataset: the rows.
        processor: the model's.
        max_length: the longest sample allowed; None: rows are not even tokenised.
        needs_images: whether text-only rows are refused: where only the connector is trained, a batch of them has
            nothing to learn from.

    Raises:
        ValueError: naming the first row that is wrong.
    """
    for row in host_logging.tqdm(dataset, desc="Checking rows", leave=False, disable=None):
        num_images = len(row["images"] or [])
        if needs_images and not num_images:
            raise ValueError(
                f"{where_is(row)} has no image, but method align trains the connector alone; leave text-only rows out."
            )
        check_text(row, processor.image_token)
        if max_length is not None and (length := count_tokens(row, processor)) > max_length:
            raise ValueError(
                f"{where_is(row)} is {length} tokens long ({num_images} images), "
                f"beyond max_length {max_length}. Images are never cut: shorten the text, leave the row out, or raise "
                "max_length."
            )
