"""Rows of chat data become batches: text and images in the model's form, labels on what the assistant says."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import logging as host_logging

from .host_chats import HostChats
from .marked_chats import MarkedChats
from .rows import check_text, conversation, where_is

IGNORED = -100


def chats_of(processor: Any) -> MarkedChats | HostChats:
    """How conversations are rendered and tokenised for a processor: our own counts its images, a host's does not.

    Raises:
        ValueError: if it has no chat template.
    """
    return MarkedChats(processor) if hasattr(processor, "count_image_tokens") else HostChats(processor)


@dataclass
class ChatCollator:
    """Renders, tokenises and pads rows; labels are the assistant's tokens, its end of turn included.

    Text-only rows and rows with one or several images may share a batch.

    Attributes:
        processor: the model's, our own or a host's.
        max_length: the longest sample allowed, image tokens counted; nothing is ever cut.
        padding_side: right for training, left where answers are generated.
    """

    processor: Any
    max_length: int | None = None
    padding_side: str = "right"

    def prompts(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The rows up to the last answer, which is left for the model to give."""
        return chats_of(self.processor).prompts([conversation(row)[:-1] for row in rows], self.padding_side)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A training batch: the model's inputs and `labels`, (batch, sequence), -100 where there is no target.

        Raises:
            ValueError: naming the row, for an unreadable image, a sample that is too long or one without a target.
        """
        chats = chats_of(self.processor)
        for row in rows:
            check_text(row, chats.image_tokens)
        batch, said = chats.encode([conversation(row) for row in rows], self.padding_side, [*map(where_is, rows)])
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


def count_tokens(row: Mapping[str, Any], processor: Any) -> int:
    """A row's tokens, image tokens counted."""
    return chats_of(processor).count_tokens(row)


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
    chats = chats_of(processor)
    for row in host_logging.tqdm(dataset, desc="Checking rows", leave=False, disable=None):
        num_images = len(row["images"] or [])
        if needs_images and not num_images:
            raise ValueError(
                f"{where_is(row)} has no image, but method align, or a train that leaves the LLM out, trains only "
                "what images reach; leave text-only rows out."
            )
        check_text(row, chats.image_tokens)
        chats.check(row)
        if max_length is not None and (length := chats.count_tokens(row)) > max_length:
            raise ValueError(
                f"{where_is(row)} is {length} tokens long ({num_images} images), "
                f"beyond max_length {max_length}. Images are never cut: shorten the text, leave the row out, or raise "
                "max_length."
            )
