"""Rows of chat data as conversations: messages of parts, opened images in their places, refusals that name the row."""

from collections.abc import Iterable, Mapping
from typing import Any

from .data_formats.faults import IN_TEXT, NO_ANSWER, DataFault
from .data_formats.mixtures import SOURCE
from .data_formats.reading import DATA_FILE, ROW
from .image_files import open_image

Conversation = list[dict[str, Any]]


def where_is(row: Mapping[str, Any]) -> str:
    """What messages call a row."""
    source = row.get(DATA_FILE) or row.get(SOURCE) or "the data"
    return f"Row {row[ROW]} of {source}" if row.get(ROW) is not None else f"A row of {source}"


def conversation(row: Mapping[str, Any]) -> Conversation:
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


def check_text(row: Mapping[str, Any], image_tokens: Iterable[str]) -> None:
    """Refuses a text that would be read as an image, and a row of empty answers.

    Args:
        row: the row.
        image_tokens: what stands for an image in a text.

    Raises:
        ValueError: naming the row.
    """
    is_answered = False
    for message in row["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text" and (found := [token for token in image_tokens if token in part["text"]]):
                raise DataFault(
                    f"{where_is(row)} has {found[0]} in its text, which the model reads as an image; write it "
                    'otherwise, or give an image by {"type": "image"}.',
                    IN_TEXT,
                )
            is_answered |= message["role"] == "assistant" and (part["type"] != "text" or bool(part["text"].strip()))
    if not is_answered:
        raise DataFault(f"{where_is(row)} has no answer of the assistant that is not empty; give one.", NO_ANSWER)
