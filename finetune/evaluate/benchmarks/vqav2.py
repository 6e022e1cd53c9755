"""VQAv2 (1612.00837): soft accuracy over ten people's answers, overall and per type of answer.

    vqav2/v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json,
    vqav2/val2014/COCO_val2014_000000000042.jpg

The answers of its test sets are not public: those are scored by a server.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..asked import Asked
from ..question_sets import QuestionSet, question_row
from ..tasks import Scoring, means
from ..vqa_answers import normalize_submission, normalize_vqa, soft_accuracy
from .files import MAX_NEW_TOKENS, SHORT_ANSWER, get, need_files, need_images, read_json

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
IMAGES = "val2014"


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The server's accuracy of what LLaVA-1.5 would submit.

    Answers on which all people agree are compared as they are written; others are normalised, and the model's too.
    """
    submitted = normalize_submission(prediction)
    written = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(written)) == 1:
        return soft_accuracy(submitted, written)
    return soft_accuracy(normalize_vqa(submitted), [*map(normalize_vqa, written)])


def statistics(predictions: Sequence[str], asked: Sequence[Asked]) -> np.ndarray:
    """The accuracy of each answer, (rows, 1)."""
    pairs = zip(predictions, asked, strict=True)
    return np.array([[official_accuracy(given, one.answers)] for given, one in pairs], dtype=float).reshape(-1, 1)


SCORING = Scoring(("accuracy",), statistics, means, "VQAv2's accuracy")


def load(folder: Path) -> QuestionSet:
    """The questions of the validation set.

    Raises:
        ValueError: if files or images are missing, a question has no annotation, or a file has another schema.
    """
    need_files(folder, (QUESTIONS, ANNOTATIONS), "VQAv2")
    where = str(folder / ANNOTATIONS)
    annotations = {
        get(entry, "question_id", int, where): entry
        for entry in get(read_json(folder / ANNOTATIONS), "annotations", list, where)
    }
    rows, asked, types, ids, paths = [], [], [], [], []
    entries = get(read_json(folder / QUESTIONS), "questions", list, str(folder / QUESTIONS))
    for number, entry in enumerate(entries, start=1):
        here = f"{folder / QUESTIONS}, question {number}"
        identity = get(entry, "question_id", int, here)
        if identity not in annotations:
            raise ValueError(f"{here}: there is no annotation of question {identity}; give files of the same split.")
        there = f"{where}, question {identity}"
        answers = tuple(get(one, "answer", str, there) for one in get(annotations[identity], "answers", list, there))
        types.append(get(annotations[identity], "answer_type", str, there))
        paths.append(folder / IMAGES / f"COCO_{IMAGES}_{get(entry, 'image_id', int, here):012d}.jpg")
        prompt = f"{get(entry, 'question', str, here)}\n{SHORT_ANSWER}"
        rows.append(question_row(prompt, paths[-1], answers[0], number))
        asked.append(Asked(answers))
        ids.append(identity)
    need_images(paths, "VQAv2")
    return QuestionSet("VQAv2", rows, asked, SCORING, {"answer type": types}, max_new_tokens=MAX_NEW_TOKENS, ids=ids)
