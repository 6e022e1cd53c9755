"""scikit-learn's handwritten digits as a folder of images with questions: the label depends on image and text.

    3/0003.png ...   8 x 8 pixels, a sub-folder per digit
    metadata.jsonl   {"file_name": "3/0003.png", "task": "parity", "text": "Is it odd or even?", "label": "odd"}

1797 images of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), which come with
scikit-learn: nothing is downloaded.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .data import METADATA
from .extras import sklearn_module

BRIGHTEST = 16  # of load_digits' pixels


@dataclass(frozen=True)
class Task:
    """What may be asked of a digit.

    Attributes:
        name: what reports call it.
        texts: how it is asked, in turn.
        answer: the label of a digit.
    """

    name: str
    texts: tuple[str, ...]
    answer: Callable[[int], str]


TASKS = (
    Task("digit", ("Which digit is it?", "Name the number in the image."), str),
    Task("parity", ("Is it odd or even?", "Can two divide it?"), lambda digit: "odd" if digit % 2 else "even"),
    Task(
        "above four",
        ("Is it above four?", "Is it larger than 4?"),
        lambda digit: "above" if digit > 4 else "not above",
    ),
)


def write_digits(folder: Path, num_images: int | None = None) -> Path:
    """Writes the digits with every task's question.

    Args:
        folder: where to.
        num_images: how many, from the first on; None: all 1797.

    Returns:
        The folder.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    digits = sklearn_module("datasets").load_digits()
    rows = []
    for index, (pixels, digit) in enumerate(zip(digits.images[:num_images], digits.target.tolist(), strict=False)):
        name = f"{digit}/{index:04d}.png"
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / BRIGHTEST)).astype(np.uint8)).save(folder / name)
        for task in TASKS:
            text = task.texts[index % len(task.texts)]
            rows.append({"file_name": name, "task": task.name, "text": text, "label": task.answer(digit)})
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / METADATA[0]).write_text(lines, encoding="utf-8")
    return folder
