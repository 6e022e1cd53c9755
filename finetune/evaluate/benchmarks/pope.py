"""POPE (2305.10355): whether an object is in an image; accuracy, precision, recall, F1 and the share of yes.

    pope/coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json (one JSON object per line),
    pope/val2014/COCO_val2014_000000310196.jpg

Papers report the F1's mean over the three categories.
"""

from pathlib import Path
from typing import Any

from ..asked import Asked
from ..question_sets import QuestionSet, question_row
from ..tasks import TASKS
from .files import MAX_NEW_TOKENS, SHORT_ANSWER, get, need_files, need_images, read_json_lines

CATEGORIES, IMAGES = ("random", "popular", "adversarial"), "val2014"
LABELS = ("yes", "no")


def load(folder: Path) -> QuestionSet:
    """The questions of all three categories.

    Raises:
        ValueError: if files or images are missing, a label is neither yes nor no, or a file has another schema.
    """
    names = {category: f"coco_pope_{category}.json" for category in CATEGORIES}
    need_files(folder, names.values(), "POPE")
    rows: list[dict[str, Any]] = []
    asked, categories, ids, paths = [], [], [], []
    for category, name in names.items():
        for line, entry in enumerate(read_json_lines(folder / name), start=1):
            here = f"{folder / name}, line {line}"
            label = get(entry, "label", str, here)
            if label not in LABELS:
                raise ValueError(f"{here}: the label is {label!r}; expected yes or no.")
            paths.append(folder / IMAGES / get(entry, "image", str, here))
            prompt = f"{get(entry, 'text', str, here)}\n{SHORT_ANSWER}"
            rows.append(question_row(prompt, paths[-1], label, len(rows) + 1))
            asked.append(Asked((label,)))
            categories.append(category)
            ids.append(f"{category}/{get(entry, 'question_id', int, here)}")
    need_images(paths, "POPE")
    return QuestionSet(
        "POPE",
        rows,
        asked,
        TASKS["yes-no"].scoring,
        {"category": categories},
        max_new_tokens=MAX_NEW_TOKENS,
        averaged={"category": "f1"},
        ids=ids,
    )
