"""Multiple choice: which letter an answer gives, and whether it is the right one's."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from ..metrics import normalize_answer
from .asked import Asked

ALONE = re.compile(r"\(?([A-Za-z])\)?[.:,)]?")
IN_FRONT = re.compile(r"\(?([A-Z])(?:[.:)]|\.\))\s")
ANNOUNCED = re.compile(r"answer is:?\s*\(?([A-Z])\b", re.IGNORECASE)


def read_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer gives: "B", "(b)", "B. a dog", "The answer is B", or the text of one option alone.

    Args:
        text: the answer.
        choices: the options; none: any letter is one.

    Returns:
        The letter; None where the answer gives none.
    """
    letters = ascii_uppercase[: len(choices) or None]
    text = text.strip()
    for match in (ALONE.fullmatch(text), IN_FRONT.match(text), ANNOUNCED.search(text)):
        if match is not None and match[1].upper() in letters:
            return match[1].upper()
    same = [letter for letter, choice in zip(letters, choices, strict=False) if is_same(text, choice)]
    return same[0] if len(same) == 1 else None


def is_same(first: str, second: str) -> bool:
    """Whether two answers are the same word for word."""
    return normalize_answer(first) == normalize_answer(second)


def right_letter(one: Asked) -> str:
    """The right option's letter.

    Raises:
        ValueError: if the right answer is neither a letter nor one of the options.
    """
    letter = read_letter(one.answers[0], one.choices)
    if letter is None:
        shown = ", ".join(one.choices) or "one letter"
        raise ValueError(
            f"The right answer to a multiple choice is {one.answers[0]!r}; expected a letter or one of the options: "
            f"{shown}."
        )
    return letter


def choice_statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """Whether the letter is the right one, and whether there was none to read, (rows, 2).

    Raises:
        ValueError: if a right answer is neither a letter nor one of the options.
    """
    found = []
    for prediction, one in zip(predictions, asked, strict=True):
        letter = read_letter(prediction, one.choices)
        found.append((float(letter == right_letter(one)), float(letter is None)))
    return np.array(found, dtype=float).reshape(-1, 2)
