"""TextVQA (1904.08920): soft accuracy over ten people's answers, with OCR tokens in the prompt where there are any.

textvqa/TextVQA_0.5.1_val.json, textvqa/TextVQA_Rosetta_OCR_v0.2_val.json (optional),
textvqa/train_images/0054c91397f2fe05.jpg
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..asked import Asked
from ..question_sets import QuestionSet, question_row
from ..tasks import Scoring, means
from ..vqa_answers import normalize_submission, soft_accuracy
from .files import MAX_NEW_TOKENS, SHORT_ANSWER, get, need_files, need_images, read_json

QUESTIONS, OCR, IMAGES = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json", "train_images"
NUM_ANSWERS = 10


def statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """The soft accuracy of each answer, (rows, 1)."""
    found = []
    for prediction, one in zip(predictions, asked, strict=True):
        answers = [*map(normalize_submission, one.answers)]
        found.append([soft_accuracy(normalize_submission(prediction), answers)])
    return np.array(found, dtype=float).reshape(-1, 1)


SCORING = Scoring(("accuracy",), statistics, means, "TextVQA's accuracy")


def read_ocr(path: Path) -> dict[str, list[str]] | None:
    """The tokens read off each image; None where there is no such file.

    Raises:
        ValueError: if it has another schema.
    """
    if not path.is_file():
        return None
    return {
        get(entry, "image_id", str, str(path)): [
            get(one, "word", str, str(path)) for one in get(entry, "ocr_info", list, str(path))
        ]
        for entry in get(read_json(path), "data", list, str(path))
    }


def load(folder: Path) -> QuestionSet:
    """The questions of the validation set.

    Raises:
        ValueError: if the file or images are missing, a question has not ten answers, an image has no OCR tokens where
            others have, or a file has another schema.
    """
    need_files(folder, (QUESTIONS,), "TextVQA")
    ocr = read_ocr(folder / OCR)
    rows, asked, ids, paths = [], [], [], []
    entries = get(read_json(folder / QUESTIONS), "data", list, str(folder / QUESTIONS))
    for number, entry in enumerate(entries, start=1):
        here = f"{folder / QUESTIONS}, question {number}"
        image = get(entry, "image_id", str, here)
        answers = tuple(get(entry, "answers", list, here))
        if len(answers) != NUM_ANSWERS or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{here} has {len(answers)} answers; expected ten texts, as in the validation set.")
        if ocr is not None and image not in ocr:
            raise ValueError(f"{folder / OCR} has no tokens of the image {image}; give the file of the same split.")
        tokens = "" if ocr is None else f"Reference OCR token: {', '.join(ocr[image])}\n"
        prompt = f"{get(entry, 'question', str, here).capitalize()}\n{tokens}{SHORT_ANSWER}"
        paths.append(folder / IMAGES / f"{image}.jpg")
        rows.append(question_row(prompt, paths[-1], answers[0], number))
        asked.append(Asked(answers))
        ids.append(get(entry, "question_id", int, here))
    need_images(paths, "TextVQA")
    without = f"Without OCR tokens in the prompt: there is no {OCR}. LLaVA-1.5's figures are with them."
    notes = (without,) if ocr is None else ()
    return QuestionSet("TextVQA", rows, asked, SCORING, notes=notes, max_new_tokens=MAX_NEW_TOKENS, ids=ids)
