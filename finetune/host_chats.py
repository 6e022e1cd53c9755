"""Chats in the form of a host's own processor and chat template, which marks no answers (see answer_spans.py).

Batches are what the processor gives in one call, everything of it. An answer's tokens are those that its characters
became in that call; the same tokens have to come out of the text without its images. Where a processor does not say
where its images' tokens went, an answer's tokens are those behind the processed prompt, which has to be the beginning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import load_image

from modeling_vlmoe.chat_templates import TEMPLATE_ERRORS
from modeling_vlmoe.conversion.parents import BROKEN

from .answer_spans import Span, find_answers
from .image_files import image_size
from .rows import Conversation, where_is

OFFSETS, REPLACED = "offset_mapping", "text_replacement_offsets"
# What a processor may give that is no input: labels of its own (PaliGemma's).
NO_INPUTS = ("labels",)


def as_parts(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Messages whose every content is a list of parts, as hosts' templates take them."""
    found = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{name: value for name, value in part.items() if value is not None} for part in parts]
        found.append({"role": message["role"], "content": parts})
    return found


def images_of(messages: Conversation) -> list[Image.Image]:
    """The opened images of a conversation, upright and in RGB."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [load_image(part["image"]) for part in parts if part["type"] == "image"]


def is_inside(offsets_S2: Tensor, spans: Sequence[Span]) -> Tensor:
    """Which tokens have a character in one of the spans, (sequence,).

    Args:
        offsets_S2: each token's first character, and the one behind its last; of a token of white space the tokenizer
            may have moved the first behind it.
        spans: the characters.
    """
    first_S, last_S = offsets_S2.unbind(-1)
    first_S = torch.minimum(first_S, last_S - 1)
    found = torch.zeros_like(first_S, dtype=torch.bool)
    for first, last in spans:
        found |= (last_S > first) & (first_S < last)
    return found


def moved(span: Span, replaced: Sequence[Mapping[str, Any]]) -> Span:
    """A span of the rendered text in the text whose placeholders have become images."""
    gains = [(one["span"][1], len(one["replacement"]) - len(one["text"])) for one in replaced]
    first, last = (place + sum(gain for end, gain in gains if end <= place) for place in span)
    return first, last


@dataclass
class HostChats:
    """Renders and tokenises conversations.

    Attributes:
        processor: a host's.

    Raises:
        ValueError: if it has no chat template.
    """

    processor: Any
    _images: dict[tuple[tuple[int, int], ...], list[tuple[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = type(self.processor).__name__
        template = getattr(self.processor, "chat_template", None)
        if not template or (isinstance(template, dict) and "default" not in template):
            raise ValueError(
                f"The processor ({self.name}) has no chat template{' named default' if template else ''}, so "
                "conversations cannot be laid out. Put the model's chat_template.jinja beside its weights, or set "
                "processor.chat_template and save the processor there."
            )
        tokenizer = self.processor.tokenizer
        self.closers = tuple({*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder})

    @property
    def image_tokens(self) -> tuple[str, ...]:
        """What is read as an image or a video in a text."""
        ids = [one for one in self.processor.image_token_ids if isinstance(one, int)]
        written = self.processor.tokenizer.convert_ids_to_tokens(ids)
        return tuple({*self.processor.all_special_multimodal_tokens, *written})

    def render(self, messages: Conversation, has_prompt: bool = False, where: str = "A conversation") -> str:
        """A conversation by the processor's chat template, with the prompt for an answer where that is asked for.

        Raises:
            ValueError: if the template refuses it.
        """
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=has_prompt)
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"{where}: the chat template of the processor ({self.name}) cannot render messages of {roles}: "
                f"{error}. Give roles and contents that it takes."
            ) from error

    def answers(self, messages: Conversation, where: str) -> list[Span]:
        """The characters of each answer in the rendered conversation."""
        return find_answers(partial(self.render, where=where), messages, self.closers, where)

    def process(self, texts: list[str], images: list[list[Any]], side: str, **options: Any) -> dict[str, Any]:
        """What the processor makes of rendered conversations with their images, padded on a side.

        Raises:
            ValueError: if it refuses them.
        """
        try:
            made = self.processor(
                text=list(texts),
                images=images if any(images) else None,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                **self.special_tokens(texts[0]),
                **options,
            )
        except BROKEN as error:
            raise ValueError(
                f"The processor ({self.name}) cannot read conversations with {[len(one) for one in images]} images: "
                f"{error} Give rows that it takes."
            ) from error
        return {name: value for name, value in made.items() if name not in NO_INPUTS}

    def special_tokens(self, text: str) -> dict[str, bool]:
        """As the host's `apply_chat_template`: no special tokens are added where the template has written one."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}

    def prompts(self, conversations: Sequence[Conversation], side: str) -> dict[str, Tensor]:
        """Conversations that the assistant is to go on with, padded on a side."""
        conversations = [as_parts(messages) for messages in conversations]
        texts = [self.render(messages, True) for messages in conversations]
        return self.process(texts, [images_of(messages) for messages in conversations], side)

    def encode(
        self, conversations: Sequence[Conversation], side: str, wheres: Sequence[str]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Whole conversations, padded on a side, and which of their tokens the assistant says, (batch, sequence).

        Raises:
            ValueError: naming the conversation of which that cannot be said.
        """
        conversations = [as_parts(messages) for messages in conversations]
        texts = [self.render(messages, where=where) for messages, where in zip(conversations, wheres, strict=True)]
        images = [images_of(messages) for messages in conversations]
        try:
            batch = self.process(texts, images, side, return_offsets_mapping=True, **{f"return_{REPLACED}": True})
        except ValueError:
            # Idefics3's makes tensors of the places, and cannot where the first row has no image (transformers 5.23).
            batch = self.process(texts, images, side, return_offsets_mapping=True)
        offsets, replaced = batch.pop(OFFSETS), batch.pop(REPLACED, None)
        replaced = replaced if isinstance(replaced, list) else [[]] * len(texts)
        said = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, (messages, text, where) in enumerate(zip(conversations, texts, wheres, strict=True)):
            spans, is_real = self.answers(messages, where), batch["attention_mask"][row].bool()
            own = is_inside(offsets[row], [moved(span, replaced[row]) for span in spans])
            own &= ~is_inside(offsets[row], [one["new_span"] for one in replaced[row]]) & is_real
            if not torch.equal(batch["input_ids"][row][own], self.plain_answers(text, spans, messages)):
                own[is_real] = self.behind_prompts(messages, text, spans, batch["input_ids"][row][is_real], where)
            said[row] = own
        return batch, said

    def plain_answers(self, text: str, spans: list[Span], messages: Conversation) -> Tensor:
        """The answers' tokens in a rendered text whose images are placeholders, these left out."""
        made = self.processor.tokenizer(
            text, return_offsets_mapping=True, return_tensors="pt", **self.special_tokens(text)
        )
        ids = made["input_ids"][0]
        is_image = torch.isin(ids, torch.tensor(self.placeholder_ids))
        return ids[is_inside(made[OFFSETS][0], spans) & ~is_image]

    @property
    def placeholder_ids(self) -> list[int]:
        """The ids of what stands for an image in a text."""
        ids = self.processor.tokenizer.convert_tokens_to_ids(list(self.image_tokens))
        return [one for one in ids if one is not None]  # a placeholder of videos may be no token (SmolVLM)

    def behind_prompts(self, messages: Conversation, text: str, spans: list[Span], ids: Tensor, where: str) -> Tensor:
        """Which tokens of a processed conversation are behind the prompts for its answers, (sequence,).

        Raises:
            ValueError: naming the conversation, if a processed prompt is not its beginning.
        """
        said = torch.zeros_like(ids, dtype=torch.bool)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index, span in zip(answers, spans, strict=True):
            ends = []
            for end, part in zip(span, (messages[:index], messages[: index + 1]), strict=True):
                made = self.process([text[:end]], [images_of(part)], "right")["input_ids"][0]
                if not torch.equal(ids[: len(made)], made):
                    raise ValueError(
                        f"{where}: the processor ({self.name}) does not tokenise the beginning of a conversation as "
                        "it does the whole, so it is not known which tokens are the answer's. Train this model by "
                        "what its own processor has for it."
                    )
                ends.append(len(made))
            said[ends[0] : ends[1]] = True
        return said & ~torch.isin(ids, torch.tensor(self.placeholder_ids))

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuses a row of which it cannot be said what the model is to say; no image is opened."""
        self.answers(as_parts(row["messages"]), where_is(row))

    def count_tokens(self, row: Mapping[str, Any]) -> int:
        """A row's tokens: as many as the processor makes of it, by the text in which its placeholders have become
        images; of images only the sizes are read.
        """
        text = self.render(as_parts(row["messages"]), where=where_is(row))
        sizes = tuple(image_size(image, where_is(row)) for image in row["images"] or [])
        if sizes and sizes not in self._images:
            blanks = [Image.new("RGB", size) for size in sizes]
            made = self.process([text], [blanks], "right", **{f"return_{REPLACED}": True})
            if not isinstance(made.get(REPLACED), list):
                return made["input_ids"].shape[1]
            self._images[sizes] = [(one["text"], one["replacement"]) for one in made[REPLACED][0]]
        written, rest = "", text
        for placeholder, replacement in self._images.get(sizes, []):
            before, _, rest = rest.partition(placeholder)
            written += before + replacement
        return len(self.processor.tokenizer(written + rest, **self.special_tokens(text))["input_ids"])
