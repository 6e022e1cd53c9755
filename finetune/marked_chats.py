"""Chats in the form of our own processor, whose chat template marks what the assistant says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .image_files import open_image
from .rows import Conversation, where_is


@dataclass(frozen=True)
class MarkedChats:
    """Renders and tokenises conversations.

    Attributes:
        processor: a `VLMoEProcessor`.
    """

    processor: Any

    @property
    def image_tokens(self) -> tuple[str, ...]:
        """What stands for an image in a text."""
        return (self.processor.image_token,)

    def prompts(self, conversations: Sequence[Conversation], side: str) -> dict[str, Tensor]:
        """Conversations that the assistant is to go on with, padded on a side."""
        return self._encode(conversations, side, add_generation_prompt=True)

    def encode(
        self, conversations: Sequence[Conversation], side: str, wheres: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Whole conversations, padded on a side, and which of their tokens the assistant says, (batch, sequence)."""
        batch = self._encode(conversations, side, return_assistant_tokens_mask=True)
        said = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        return batch, said & (batch["input_ids"] != self.processor.image_token_id)

    def _encode(self, conversations: Sequence[Conversation], side: str, **kwargs: Any) -> dict[str, Tensor]:
        encoded = self.processor.apply_chat_template(
            list(conversations),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": side},
            **kwargs,
        )
        return dict(encoded)

    def check(self, row: Mapping[str, Any]) -> None:
        """Any row can be rendered: the template was checked when it was given its marks."""

    def count_tokens(self, row: Mapping[str, Any]) -> int:
        """A row's tokens; images are opened only where each has a number of tokens of its own."""
        text = self.processor.apply_chat_template(row["messages"], tokenize=False)
        tokenizer = self.processor.tokenizer
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        length = len(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])
        images = [partial(open_image, image, where_is(row)) for image in row["images"] or []]
        return length + self.processor.count_image_tokens(images) - len(images)
