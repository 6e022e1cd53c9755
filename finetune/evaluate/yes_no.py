"""Yes or no, as POPE asks for objects in an image (2305.10355): hits, false alarms and the share of "yes"."""

from collections.abc import Sequence

import numpy as np

from .asked import Asked

NO_WORDS = frozenset({"No", "no", "not"})
MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def says_yes(text: str) -> bool:
    """POPE's rule: an answer is no where its first sentence holds the word No, no or not; anything else is yes."""
    return NO_WORDS.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def is_yes(one: Asked) -> bool:
    """Whether the right answer, which is yes or no, is yes.

    Raises:
        ValueError: if it is neither.
    """
    answer = one.answers[0]
    word = answer.strip().rstrip(".").lower()
    if word not in ("yes", "no"):
        raise ValueError(f"{one.where}: the right answer to a yes-no question is {answer!r}; expected yes or no.")
    return word == "yes"


def yes_no_statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """True and false positives, false and true negatives, one of them 1 in each row, (rows, 4).

    Raises:
        ValueError: if a right answer is neither yes nor no.
    """
    found = np.zeros((len(asked), 4))
    for row, (prediction, one) in enumerate(zip(predictions, asked, strict=True)):
        said, right = says_yes(prediction), is_yes(one)
        found[row, (0 if said else 2) + (said != right if said else said == right)] = 1
    return found


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where there is no whole."""
    return np.divide(part, whole, out=np.full_like(part, np.nan, dtype=float), where=whole > 0)


def yes_no_measures(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Accuracy, precision, recall, F1 = 2 P R / (P + R) = 2 TP / (2 TP + FP + FN), and the share of yes.

    Precision is NaN where yes is never said, recall and F1 where it is never right.

    Args:
        sums: true and false positives, false and true negatives, (..., 4).
        counts: rows, (...).
    """
    hits, alarms, misses, rejections = np.moveaxis(sums, -1, 0)
    precision, recall = _share(hits, hits + alarms), _share(hits, hits + misses)
    f1 = np.where(np.isnan(recall), np.nan, _share(2 * hits, 2 * hits + alarms + misses))
    return np.stack([_share(hits + rejections, counts), precision, recall, f1, _share(hits + alarms, counts)], axis=-1)
