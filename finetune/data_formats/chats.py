"""Chat messages in the one form that the collator reads, and the placeholders of images in texts.

"<image>\nWhich colour?"  ->  [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .faults import ANSWERED, EMPTY, MESSAGES, NO_ANSWER, ROLE, UNFILLED, UNPLACED, DataFault

ROLES = ("system", "user", "assistant", "tool")
IMAGE_PART: Mapping[str, Any] = {"type": "image", "text": None}
# The line break beside a placeholder is how LLaVA's files set it apart from the text, no part of the text.
PLACEHOLDER = re.compile(r"\n?<image>\n?")
SHOWN = 80  # characters of what a user gave, in a message


def shown(value: Any) -> str:
    """What a user gave, at a length that a message can hold."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def text_part(text: str) -> dict[str, Any]:
    """A text as a part of a message."""
    return {"type": "text", "text": text}


def placed_parts(text: str) -> list[dict[str, Any]]:
    """A text in which `<image>` stands for an image, as parts."""
    pieces = PLACEHOLDER.split(text)
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        parts += [dict(IMAGE_PART)] if index else []
        parts += [text_part(piece)] if piece or len(pieces) == 1 else []
    return parts


def text_parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A message's content as parts, text or image placeholder.

    Raises:
        DataFault: if it is neither a string nor such parts.
    """
    if isinstance(content, str):
        return placed_parts(content)
    if not isinstance(content, list):
        raise DataFault(
            f'{where}: a message\'s "content" is {shown(content)}; expected a string or a list of parts.', MESSAGES
        )
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(text_part(part["text"]))
        elif kind == "image" and not any(part.get(key) for key in ("path", "url", "image", "base64")):
            parts.append(dict(IMAGE_PART))
        else:
            raise DataFault(
                f'{where}: a part of a message is {shown(part)}; expected {{"type": "text", "text": "..."}} or '
                '{"type": "image"}, with the images named in "images".',
                MESSAGES,
            )
    return parts


def check_answered(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuses a row that the assistant says nothing in."""
    if not any(message["role"] == "assistant" for message in messages):
        raise DataFault(
            f"{where} has no message of the assistant, so nothing could be learnt from it. Leave it out.", NO_ANSWER
        )


def read_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """A row's messages in the one form the collator reads.

    Raises:
        DataFault: naming the row, if they are none.
    """
    if not isinstance(messages, list) or not messages:
        raise DataFault(f'{where} has no "messages"; expected a list of {{"role": ..., "content": ...}}.', EMPTY)
    read = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataFault(
                f'{where}: a message is {shown(message)}; expected {{"role": ..., "content": ...}}.', MESSAGES
            )
        if message["role"] not in ROLES:
            raise DataFault(
                f"{where}: a message's role is {message['role']!r}; expected one of {', '.join(ROLES)}.", ROLE
            )
        # Arrow gives all messages of a column the same keys, None where a message has no such.
        if others := sorted(key for key in message if key not in ("role", "content") and message[key] is not None):
            raise DataFault(
                f"{where}: a message has the keys {', '.join(others)}, of which nothing would be learnt; expected "
                "role and content. Write into the content what the model is to read or say.",
                MESSAGES,
            )
        read.append({"role": message["role"], "content": text_parts(message.get("content"), where)})
    check_answered(read, where)
    return read


def question_and_answer(question: str, answer: str, num_images: int) -> list[dict[str, Any]]:
    """One turn: the images in front of the question, unless it says by `<image>` where they are."""
    parts = placed_parts(question)
    if all(part["type"] == "text" for part in parts):
        parts = [dict(IMAGE_PART) for _ in range(num_images)] + parts
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": placed_parts(answer)}]


def check_answers_are_text(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuses an image in what the assistant says: nothing would be learnt of it.

    Raises:
        DataFault: naming the row.
    """
    said = [part for message in messages if message["role"] == "assistant" for part in message["content"]]
    if any(part["type"] == "image" for part in said):
        raise DataFault(
            f"{where} has an image, or <image>, in what the assistant says; move it into the question, or leave it "
            "out of the answer.",
            ANSWERED,
        )


def check_image_count(messages: Sequence[Mapping[str, Any]], num_images: int, where: str) -> None:
    """Refuses a row whose images are not as many as its placeholders.

    Raises:
        DataFault: naming the row.
    """
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != num_images:
        raise DataFault(
            f"{where} has {num_images} images, but {placeholders} image parts in its messages; give one "
            '{"type": "image"}, or in a text one <image>, per image.',
            UNPLACED if num_images > placeholders else UNFILLED,
        )
