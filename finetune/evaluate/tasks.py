"""The table of tasks: how answers are turned into numbers per row, and these into measures.

Every measure is a function of sums over rows, so that groups, resamples and differences all come from one pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import anls, captions, multiple_choice, vqa_answers, yes_no
from .asked import Asked


def means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means of statistics over rows.

    Args:
        sums: (..., statistics).
        counts: rows, (...).
    """
    return sums / counts[..., None]


@dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    Attributes:
        measures: what comes out, the headline first.
        statistics: answers and what was asked, to numbers per row, (rows, statistics).
        finish: sums of those, (..., statistics), and numbers of rows, (...), to measures, (..., measures); NaN where
            the rows do not define one.
        description: the headline in words, as a card says it.
        shows_all_by_group: whether tables show every measure of a group, not its headline alone.
    """

    measures: tuple[str, ...]
    statistics: Callable[[Sequence[str], Sequence[Asked]], np.ndarray]
    finish: Callable[[np.ndarray, np.ndarray], np.ndarray]
    description: str
    shows_all_by_group: bool = False

    def measure(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What `finish` gives, with 0 for what the rows do not define, as scikit-learn has it.

        Args:
            sums: (..., statistics).
            counts: rows, (...).
        """
        values = self.finish(sums, counts)
        return np.where(np.isnan(values), 0.0, values)

    def compute(self, statistics: np.ndarray) -> dict[str, float]:
        """The measures over all rows.

        Args:
            statistics: (rows, statistics).

        Raises:
            ValueError: if there are no rows.
        """
        if not len(statistics):
            raise ValueError("There are no answers to score; give one or more.")
        values = self.measure(statistics.sum(0), np.array(float(len(statistics))))
        return dict(zip(self.measures, map(float, values), strict=True))


@dataclass(frozen=True)
class Task:
    """A task over rows of chat data.

    Attributes:
        scoring: how its answers are scored.
        summary: what it is, for help.
        max_new_tokens: of an answer, where nothing else is asked for.
        group: the column that groups the rows where none is asked for and rows have it.
    """

    scoring: Scoring
    summary: str
    max_new_tokens: int = 16
    group: str | None = None


TASKS: dict[str, Task] = {
    "vqa": Task(
        Scoring(
            ("soft_accuracy", "exact"),
            vqa_answers.vqa_statistics,
            means,
            "VQA's soft accuracy of the normalised answer",
        ),
        "short answers: VQA's soft accuracy, and exact match",
    ),
    "caption": Task(
        Scoring(captions.MEASURES, captions.caption_statistics, captions.caption_measures, "CIDEr-D of the caption"),
        "captions: CIDEr, BLEU, ROUGE-L",
        max_new_tokens=64,
    ),
    "yes-no": Task(
        Scoring(
            yes_no.MEASURES,
            yes_no.yes_no_statistics,
            yes_no.yes_no_measures,
            "accuracy of yes or no (POPE)",
            shows_all_by_group=True,
        ),
        "yes or no, as POPE",
        group="category",
    ),
    "anls": Task(
        Scoring(("anls",), anls.anls_statistics, means, "average normalised Levenshtein similarity (ANLS)"),
        "text read off images: ANLS",
        max_new_tokens=32,
    ),
    "multiple-choice": Task(
        Scoring(
            ("accuracy", "unread"),
            multiple_choice.choice_statistics,
            means,
            "accuracy of the option's letter",
        ),
        "multiple choice, by letter or option",
    ),
}
