"""GQA (1902.09506): exact match, overall and per type of question.

gqa/testdev_balanced_questions.json, gqa/images/n161313.jpg
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..asked import Asked
from ..question_sets import QuestionSet, question_row
from ..tasks import Scoring, means
from .files import MAX_NEW_TOKENS, SHORT_ANSWER, get, need_files, need_images, read_json

QUESTIONS, IMAGES = "testdev_balanced_questions.json", "images"


def is_right(prediction: str, answer: str) -> bool:
    """Whether an answer, in lower case and without periods at its end, is the right one to the letter."""
    return prediction.strip().rstrip(".").lower() == answer


def statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """Whether each answer is right, (rows, 1)."""
    pairs = zip(predictions, asked, strict=True)
    return np.array([[float(is_right(given, one.answers[0]))] for given, one in pairs]).reshape(-1, 1)


SCORING = Scoring(("accuracy",), statistics, means, "GQA's accuracy")


def load(folder: Path) -> QuestionSet:
    """The balanced questions of the test-dev set.

    Raises:
        ValueError: if the file or images are missing, or it has another schema.
    """
    need_files(folder, (QUESTIONS,), "GQA")
    found = read_json(folder / QUESTIONS)
    if not isinstance(found, dict):
        raise ValueError(f"{folder / QUESTIONS} is no mapping of questions; expected GQA's own file.")
    rows, asked, paths = [], [], []
    groups: dict[str, list[str]] = {"kind": [], "structure": [], "semantics": []}
    for number, (identity, entry) in enumerate(found.items(), start=1):
        here = f"{folder / QUESTIONS}, question {identity}"
        types = get(entry, "types", dict, here)
        structure = get(types, "structural", str, here)
        groups["kind"].append("open" if structure == "query" else "binary")
        groups["structure"].append(structure)
        groups["semantics"].append(get(types, "semantic", str, here))
        paths.append(folder / IMAGES / f"{get(entry, 'imageId', str, here)}.jpg")
        answer = get(entry, "answer", str, here)
        rows.append(question_row(f"{get(entry, 'question', str, here)}\n{SHORT_ANSWER}", paths[-1], answer, number))
        asked.append(Asked((answer,)))
    need_images(paths, "GQA")
    return QuestionSet("GQA", rows, asked, SCORING, groups, max_new_tokens=MAX_NEW_TOKENS, ids=[*found])
