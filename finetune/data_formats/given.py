"""What a row of any form gives: its messages, its images as they were named, and columns made of others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .chats import shown
from .faults import FORM, DataFault

Row = Mapping[str, Any]
ANSWERS = "answers"  # all right answers of a question, which `vlmoe evaluate` reads


@dataclass(frozen=True)
class Given:
    """A row that was read.

    Attributes:
        messages: as the collator reads them.
        images: paths, or `{"path": ..., "bytes": ...}`, in the order of their placeholders.
        added: further columns, by name.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    added: dict[str, Any] = field(default_factory=dict)


def given_images(row: Row, where: str) -> list[Any]:
    """A row's images, under `images` or `image`: one or a list of paths, or of what datasets stores.

    Raises:
        DataFault: naming the row, if they are none of these.
    """
    filled = {name: row[name] for name in ("images", "image") if row.get(name) not in (None, "", [])}
    if len(filled) > 1:
        raise DataFault(
            f'{where} has images under "image" and under "images": {shown(filled)}; give all of them under one.', FORM
        )
    given: Any = next(iter(filled.values()), [])
    images = given if isinstance(given, list) else [given]
    if not all(isinstance(image, str) or is_stored(image) for image in images):
        raise DataFault(f'{where}: "images" is {shown(images)}; expected a list of paths, written as texts.', FORM)
    return images


def is_stored(image: Any) -> bool:
    """Whether an image is one as datasets stores it, by path or by bytes."""
    if not isinstance(image, Mapping):
        return False
    content, path = image.get("bytes"), image.get("path")
    return bool(content or path) and isinstance(content, bytes | None) and isinstance(path, str | None)


def given_text(row: Row, names: tuple[str, ...], where: str) -> str:
    """The first text that a row has under some names.

    Raises:
        DataFault: naming the row, if it has none.
    """
    for name in names:
        if isinstance(text := row.get(name), str) and text.strip():
            return text
    found = {name: row[name] for name in names if row.get(name) is not None}
    raise DataFault(
        f"{where} has no text under {' or '.join(map(repr, names))}{f', but {shown(found)}' if found else ''}; give "
        "one, or leave the row out.",
        FORM,
    )


def prompt_of(row: Row, num_images: int, question: str, what: str, where: str) -> str:
    """What a row without a question of its own is asked.

    Args:
        row: the row, which may have a `question`.
        num_images: its images.
        question: what is asked otherwise.
        what: what the row gives.
        where: the row, for messages.

    Raises:
        DataFault: naming the row, if it has neither an image nor a question.
    """
    if row.get("question") is not None:
        return given_text(row, ("question",), where)
    if not num_images:
        raise DataFault(
            f"{where} has {what}, but no image that it would be of; give one, or for a row of text alone its own "
            '"question".',
            FORM,
        )
    return question
