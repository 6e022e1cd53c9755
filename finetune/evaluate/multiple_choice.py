"""Multiple choice: which letter an answer gives, and whether it is the right one's."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from ..metrics import normalize_answer
from .asked import Asked

ENDS = " \t\r\n.!"
ALONE = re.compile(r"\(?([A-Za-z])\)?[.:,)]?")
IN_FRONT = re.compile(r"\(?([A-Z])(?:[.:)]|\.\))\s")
ANNOUNCED = re.compile(r"answer is:?\s*", re.IGNORECASE)
MARKED = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])(?:[.:),](?!\w)|\s*$))")
CAPITAL = re.compile(r"\(?([A-Z])\b")  # a small one is an article


def is_written_alike(first: str, second: str) -> bool:
    """Whether two answers are the same but for case and a mark at the end."""
    return first.strip(ENDS).lower() == second.strip(ENDS).lower()


def is_same(first: str, second: str) -> bool:
    """Whether two answers are the same word for word, articles left out."""
    return normalize_answer(first) == normalize_answer(second)


def named_option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option whose text an answer is; "a dog" is "a dog" before it is "dog"."""
    letters = ascii_uppercase[: len(choices)]
    for is_alike in (is_written_alike, is_same):
        same = [letter for letter, choice in zip(letters, choices, strict=True) if is_alike(text, choice)]
        if same:
            return same[0] if len(same) == 1 else None
    return None


def letter_of(match: re.Match[str] | None, letters: str) -> str | None:
    """The letter that was found, where it is an option's."""
    found = "" if match is None else next(filter(None, match.groups())).upper()
    return found if found and found in letters else None


def read_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer gives: "B", "(b)", "B. a dog", "The answer is B", or the text of one option alone.

    Behind "the answer is" a letter counts that has a mark, or nothing, behind it; then an option's text ("a dog");
    then a capital.

    Args:
        text: the answer.
        choices: the options; none: any letter is one.

    Returns:
        The letter; None where the answer gives none.
    """
    letters = ascii_uppercase[: len(choices) or None]
    text = text.strip()
    letter = letter_of(ALONE.fullmatch(text), letters) or letter_of(IN_FRONT.match(text), letters)
    letter = letter or named_option(text, choices)
    for announced in ANNOUNCED.finditer(text):
        said = text[announced.end() :]
        letter = letter or letter_of(MARKED.match(said), letters)
        letter = letter or named_option(said, choices) or letter_of(CAPITAL.match(said), letters)
    return letter


def right_letter(one: Asked) -> str:
    """The right option's letter.

    Raises:
        ValueError: if the right answer is neither a letter nor one of the options.
    """
    letter = read_letter(one.answers[0], one.choices)
    if letter is None:
        shown = ", ".join(one.choices) or "one letter"
        raise ValueError(
            f"{one.where}: the right answer to a multiple choice is {one.answers[0]!r}; expected a letter or one of "
            f"the options: {shown}."
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
