"""Average normalised Levenshtein similarity (ANLS; 1905.13648, 2007.00398), for answers that are read off an image."""

from collections.abc import Sequence

import numpy as np

from .asked import Asked

THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a character."""
    previous = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            replaced = previous[column - 1] + (letter != other)
            current.append(min(previous[column] + 1, current[-1] + 1, replaced))
        previous = current
    return previous[-1]


def similarity(prediction: str, answer: str) -> float:
    """1 - NL, NL the edit distance over the longer one's length; 0 where that is below a half.

    Lower case, and white space as one space. At exactly a half the papers' formula (NL < 0.5) gives 0, the evaluation
    server's script a half; this is the server's.
    """
    prediction, answer = (" ".join(text.lower().split()) for text in (prediction, answer))
    longest = max(len(prediction), len(answer))
    alike = 1.0 - edit_distance(prediction, answer) / longest if longest else 1.0
    return alike if alike >= THRESHOLD else 0.0


def anls_statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """The similarity to the nearest answer, (rows, 1)."""
    pairs = zip(predictions, asked, strict=True)
    return np.array([[max(similarity(given, answer) for answer in one.answers)] for given, one in pairs]).reshape(
        -1, 1
    )
