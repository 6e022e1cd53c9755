"""Exact match of short answers, as an `evaluate.Metric` that needs no network.

>>> VQAExactMatch().compute(predictions=["A red circle."], references=["red circle"], groups=["shape"])
{'accuracy': 1.0, 'low': 0.2065..., 'high': 1.0, 'count': 1, 'groups': {'shape': {...}}}
"""

import re
from collections.abc import Sequence
from math import sqrt
from typing import Any

import evaluate
from datasets import Features, Value

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
# A decimal point, and the minus in front of a number.
MARKS_OF_NUMBERS = re.compile(r"\.(?=\d)|(?<!\w)-(?=\.?\d)")
PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!.:]")
Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def normalize_answer(answer: str) -> str:
    """An answer as VQA compares it (1505.00468): lower case, no punctuation, no articles, number words as digits.

    Unlike there a number keeps its minus, and an answer of articles or punctuation alone ("A", "+") is kept.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower())
    kept = {match.start() for match in MARKS_OF_NUMBERS.finditer(text)}
    words = PUNCTUATION.sub(lambda match: match[0] if match.start() in kept else " ", text).split()
    words = [word for word in words if word not in ARTICLES] or words
    return " ".join(NUMBERS.get(word, word) for word in words) or answer.lower().strip()


def wilson_interval(num_correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927), which stays within 0 and 1 and is wide for few samples."""
    if count == 0:
        return 0.0, 1.0
    share, spread = num_correct / count, Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_correct(is_correct: Sequence[bool]) -> dict[str, float]:
    """Accuracy with its interval and the number of answers."""
    count, num_correct = len(is_correct), sum(is_correct)
    low, high = wilson_interval(num_correct, count)
    return {"accuracy": num_correct / count if count else 0.0, "low": low, "high": high, "count": count}


class VQAExactMatch(evaluate.Metric):
    """Share of answers equal to the reference after VQA's normalisation.

    `compute(predictions=[...], references=[...], groups=[...])`; `groups`, optional, names each question's kind. The
    result has `accuracy`, the 95 % interval `low` and `high`, `count`, and the same for each group under `groups`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description="Exact match of normalised short answers, overall and per group, with 95 % Wilson intervals.",
            citation="",
            inputs_description="predictions, references: strings; groups (optional): a name per question.",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[str], groups: Sequence[str] | None = None
    ) -> dict[str, Any]:
        is_correct = [
            normalize_answer(given) == normalize_answer(wanted)
            for given, wanted in zip(predictions, references, strict=True)
        ]
        if groups is None:
            return share_correct(is_correct)
        if len(groups) != len(is_correct):
            raise ValueError(
                f"groups has {len(groups)} entries, but there are {len(is_correct)} answers; give one per answer."
            )
        by_group: dict[str, list[bool]] = {}
        for group, correct in zip(groups, is_correct, strict=True):
            by_group.setdefault(str(group), []).append(correct)
        return share_correct(is_correct) | {
            "groups": {name: share_correct(by_group[name]) for name in sorted(by_group)}
        }
