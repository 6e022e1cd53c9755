"""MMBench (2307.06281): multiple choice, with CircularEval where the file holds the rotations.

    mmbench/mmbench_dev_20230712.tsv (any one .tsv): index, question, hint, A, B, C, D, answer, category, and image,
    in base64

A row whose index is a million or more is the question of the remainder with its options rotated: a question counts as
right when every one of its rows is. Where the file holds none, every question is asked once, which is not
CircularEval, and is said. The official evaluation asks ChatGPT where its rules find no option in an answer; here such
an answer is wrong, and `unread` says how many questions have one.
"""

import base64
import binascii
import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..asked import Asked
from ..question_sets import QuestionSet, question_row
from ..tasks import Scoring, means
from .files import MAX_NEW_TOKENS, OPTION_LETTER

LETTERS = "ABCD"
ROTATION = 1_000_000  # a rotation's index is the question's and a multiple of it
COLUMNS = ("index", "question", "A", "B", "answer", "image")
EMPTY = ("", "nan", "none")
LONGEST_INDEX = 64  # an image that short is the index of the row that holds it
# What may stand around an option's letter, tried one after the other.
AROUND = (
    *(("", behind) for behind in ("", ".", ",", ":", ")", ").")),
    *(("(", behind) for behind in (")", ").")),
    *((":", behind) for behind in ("", ",", ".", ")", ").")),
)
FEW_WORDS = 3  # in a longer answer "A" may be the article


def read_option(text: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names by letter, or by the text of one option alone; None where it names none.

    Args:
        text: the answer.
        choices: the options' texts.
    """
    letters, words = LETTERS[: len(choices)], text.split()
    for before, behind in AROUND:
        named = [letter for letter in letters if f"{before}{letter}{behind}" in words]
        is_article = (before, behind) == ("", "") and "A" in words and len(words) > FEW_WORDS
        if len(named) == 1 and not is_article:
            return named[0]
    said = [letter for letter, choice in zip(letters, choices, strict=True) if choice.lower() in text.lower()]
    return said[0] if len(said) == 1 else None


def statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """Of each question: whether all its passes are right, whether the first is, whether one was unread,
    (questions, 3).
    """
    passes: dict[str, list[tuple[bool, bool]]] = {}
    for prediction, one in zip(predictions, asked, strict=True):
        letter = read_option(prediction, one.choices)
        passes.setdefault(one.unit, []).append((letter == one.answers[0], letter is None))
    found = [(all(right for right, _ in own), own[0][0], any(unread for _, unread in own)) for own in passes.values()]
    return np.array(found, dtype=float).reshape(-1, 3)


SCORING = Scoring(
    ("accuracy", "first_pass", "unread"), statistics, means, "MMBench's accuracy, options read by rules alone"
)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing; pandas writes nan."""
    return value is None or str(value).strip().lower() in EMPTY


def read_table(path: Path) -> list[dict[str, Any]]:
    """The file's rows, those as they are before their rotations.

    Raises:
        ValueError: if it lacks columns, or a row's index is no number.
    """
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file, delimiter="\t")
        if missing := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; expected MMBench's own file, of a split whose "
                "answers are public (dev)."
            )
        rows = list(table)
    if bad := [row["index"] for row in rows if not str(row["index"]).isdigit()]:
        raise ValueError(f"{path}: an index is {bad[0]!r}; expected a number.")
    return sorted(rows, key=lambda row: int(row["index"]) // ROTATION)


def read_image(row: Mapping[str, Any], images: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row's image as `datasets` stores one.

    Raises:
        ValueError: if it is not base64.
    """
    written = row["image"] or ""
    written = images.get(written, "") if len(written) <= LONGEST_INDEX and written in images else written
    try:
        content = base64.b64decode(re.sub(r"\s", "", written), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: the image is not base64: {error}. Download the file again.") from error
    if not content:
        raise ValueError(f"{where} has no image; expected one in base64. Download the file again.")
    return {"path": None, "bytes": content}


def load(folder: Path) -> QuestionSet:
    """The questions of the one table in a folder.

    Raises:
        ValueError: if there is no table or several, or it is not in MMBench's schema.
    """
    tables = sorted(folder.glob("*.tsv"))
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or "none"
        raise ValueError(
            f"MMBench in {folder} is incomplete: expected one .tsv file, found {found}. Put one there, or remove the "
            "folder to leave the benchmark out."
        )
    path, rows, asked, categories, ids = tables[0], [], [], [], []
    entries = read_table(path)
    images = {entry["index"]: entry["image"] or "" for entry in entries}
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, index {entry['index']}"
        texts = [entry.get(letter) for letter in LETTERS]
        num_choices = next((place for place, text in enumerate(texts) if is_empty(text)), len(LETTERS))
        choices, right = tuple(str(text) for text in texts[:num_choices]), str(entry["answer"]).strip()
        if len(right) != 1 or right not in LETTERS[:num_choices]:
            raise ValueError(
                f"{where}: the answer is {right!r} of {num_choices} options; expected one of their letters."
            )
        hint = "" if is_empty(entry.get("hint")) else f"{entry['hint']}\n"
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        prompt = f"{hint}{entry['question']}{options}\n{OPTION_LETTER}"
        rows.append(question_row(prompt, read_image(entry, images, where), right, number))
        asked.append(Asked((right,), choices, unit=str(int(entry["index"]) % ROTATION)))
        categories.append(entry.get("category") or "none")
        ids.append(int(entry["index"]))
    rotated = any(identity >= ROTATION for identity in ids)
    note = (
        "CircularEval: right when every rotation of the options is."
        if rotated
        else ("Not CircularEval: the file holds no rotations, so every question is asked once.")
    )
    note += " Where the rules find no option, the answer is wrong; ChatGPT is not asked."
    return QuestionSet(
        "MMBench", rows, asked, SCORING, {"category": categories}, (note,), max_new_tokens=MAX_NEW_TOKENS, ids=ids
    )
