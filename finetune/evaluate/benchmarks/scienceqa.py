"""ScienceQA (2209.09513): multiple choice, questions with and without an image.

    scienceqa/problems.json, scienceqa/pid_splits.json, scienceqa/images/test/4/image.png

The letter is read by the rules of LLaVA-1.5, whose "IMG" figure is the group of questions with an image.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..asked import Asked
from ..question_sets import QuestionSet, question_row
from ..tasks import Scoring, means
from .files import MAX_NEW_TOKENS, OPTION_LETTER, get, need_files, need_images, read_json

PROBLEMS, SPLITS, SPLIT = "problems.json", "pid_splits.json", "test"
LETTERS = "ABCDE"
ANNOUNCED = re.compile(r"The answer is ([A-E])")
LOWER_GRADES = 6


def read_option(text: str, num_choices: int) -> str | None:
    """The letter: alone, in front as "B. ", or behind "The answer is "; None where there is none of a choice."""
    text = text.replace("\n", ". ")
    announced = ANNOUNCED.search(text)
    if text.strip() in [*LETTERS]:
        letter = text.strip()
    elif text[:1] in [*LETTERS] and text[1:3] == ". ":
        letter = text[0]
    else:
        letter = announced[1] if announced is not None else ""
    return letter if letter in [*LETTERS[:num_choices]] else None


def statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """Whether the letter is the right one, and whether there was none to read, (rows, 2)."""
    found = []
    for prediction, one in zip(predictions, asked, strict=True):
        letter = read_option(prediction, len(one.choices))
        found.append((float(letter == one.answers[0]), float(letter is None)))
    return np.array(found, dtype=float).reshape(-1, 2)


SCORING = Scoring(("accuracy", "unread"), statistics, means, "ScienceQA's accuracy")


def make_prompt(question: str, hint: str, choices: Sequence[str]) -> str:
    """LLaVA-1.5's: the context where there is one, the question, the options, and what is asked for."""
    context = f"Context: {hint}\n" if hint else ""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{context}{question}\n{options}\n{OPTION_LETTER}"


def load(folder: Path) -> QuestionSet:
    """The questions of the test split.

    Raises:
        ValueError: if files or images are missing, a problem of the split is not there, or a file has another schema.
    """
    need_files(folder, (PROBLEMS, SPLITS), "ScienceQA")
    problems = read_json(folder / PROBLEMS)
    rows, asked, paths = [], [], []
    groups: dict[str, list[str]] = {"image": [], "subject": [], "grades": []}
    chosen = get(read_json(folder / SPLITS), SPLIT, list, str(folder / SPLITS))
    for number, identity in enumerate(chosen, start=1):
        here = f"{folder / PROBLEMS}, problem {identity}"
        problem = get(problems, str(identity), dict, here)
        choices, right = tuple(get(problem, "choices", list, here)), get(problem, "answer", int, here)
        if not 0 <= right < len(choices) <= len(LETTERS):
            raise ValueError(
                f"{here}: the answer is {right} of {len(choices)} choices; expected 2 to 5 choices, from 0."
            )
        image = None
        if problem.get("image") is not None:
            image = folder / "images" / SPLIT / str(identity) / get(problem, "image", str, here)
            paths.append(image)
        grade = int(re.sub(r"\D", "", get(problem, "grade", str, here)) or 0)
        groups["image"].append("without" if image is None else "with")
        groups["subject"].append(get(problem, "subject", str, here))
        groups["grades"].append("1-6" if grade <= LOWER_GRADES else "7-12")
        prompt = make_prompt(get(problem, "question", str, here), get(problem, "hint", str, here).strip(), choices)
        rows.append(question_row(prompt, image, LETTERS[right], number))
        asked.append(Asked((LETTERS[right],), choices))
    need_images(paths, "ScienceQA")
    return QuestionSet("ScienceQA", rows, asked, SCORING, groups, max_new_tokens=MAX_NEW_TOKENS, ids=chosen)
