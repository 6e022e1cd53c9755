"""A folder of images becomes rows of image, text and label, and the rows are split by image.

    FOLDER/cat/1.png ...                       one sub-folder per class; the text is the same for all
    FOLDER/metadata.jsonl, or metadata.csv     {"file_name": "1.png", "text": "What is it?", "label": "cat"}, and
                                               "task": the kind of question, by which reports are grouped
    FOLDER/train/..., FOLDER/test/...          either of these, already split

These are the forms of `datasets`' imagefolder. Where no task is named, each text is one if there are few, else all
rows are of one.
"""

import csv
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .extras import sklearn_module

METADATA = ("metadata.jsonl", "metadata.csv")
NEEDED = ("file_name", "text", "label")
SPLITS = ("train", "test")
SPLIT_SEED = 0  # the same test images whatever the seed of a run
MOST_TEXTS = 16  # with more of them a text is not a task
ONE_TASK = "all"


@dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        image: path of the picture.
        text: what is asked.
        task: the kind of question.
        label: the class.
    """

    image: str
    text: str
    task: str
    label: str


@dataclass(frozen=True)
class Data:
    """Rows to train and to be judged on, of which no image is in both.

    Attributes:
        train: rows.
        test: rows.
        labels: all classes, in order; those of the test rows are among them.
        tasks: all tasks, in the order they first come in.
    """

    train: list[Row]
    test: list[Row]
    labels: list[str]
    tasks: list[str]


def _records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON; write one object per line. {error}") from error
        if record is not None and not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is {record!r}; expected an object with {', '.join(NEEDED)}.")
        records += [] if record is None else [record]
    return records


def _read_metadata(path: Path) -> list[Row]:
    records = _records(path)
    for number, record in enumerate(records, 1):
        if missing := [name for name in NEEDED if record.get(name) in (None, "")]:
            raise ValueError(
                f"{path}, record {number} has no {', '.join(missing)}; give each row {', '.join(NEEDED)}."
            )
    has_few_texts = len({record["text"] for record in records}) <= MOST_TEXTS
    return [
        Row(
            image=str(path.parent / record["file_name"]),
            text=str(record["text"]),
            task=str(record.get("task") or (record["text"] if has_few_texts else ONE_TASK)),
            label=str(record["label"]),
        )
        for record in records
    ]


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in Image.registered_extensions()


def _read_classes(folder: Path, question: str) -> list[Row]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [
        Row(image=str(path), text=question, task=question, label=one.name)
        for one in classes
        for path in sorted(one.rglob("*"))
        if _is_image(path)
    ]


def read_rows(folder: Path, question: str) -> list[Row]:
    """The rows of one folder, whose images are opened once.

    Args:
        folder: with metadata, or with one sub-folder per class.
        question: the text where there is no metadata.

    Raises:
        ValueError: naming the folder, the record or the image that is wrong.
    """
    described = [folder / name for name in METADATA if (folder / name).is_file()]
    rows = _read_metadata(described[0]) if described else _read_classes(folder, question)
    if not rows:
        raise ValueError(
            f"{folder} holds no samples; expected one sub-folder of images per class, or a {' or '.join(METADATA)} "
            f"that names {', '.join(NEEDED)}."
        )
    for image in dict.fromkeys(row.image for row in rows):
        try:
            with Image.open(image) as opened:
                opened.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"The image {image} cannot be read: {error}. Mend it, or leave it out.") from error
    return rows


def split_rows(rows: list[Row], test_share: float) -> tuple[list[Row], list[Row]]:
    """Training rows and test rows: the images are split, stratified by the label that each first comes with.

    Args:
        rows: of all images.
        test_share: share of the images that go to the test.

    Raises:
        ValueError: if a class has one image alone, or there are fewer test images than classes.
    """
    label_of: dict[str, str] = {}
    for row in rows:
        label_of.setdefault(row.image, row.label)
    counts = Counter(label_of.values())
    if rare := [label for label, count in counts.items() if count < 2]:
        raise ValueError(f"Of {', '.join(rare)} there is one image alone; give two or more of each class.")
    if min(len(label_of) * share for share in (test_share, 1 - test_share)) < len(counts):
        raise ValueError(
            f"{len(label_of)} images of {len(counts)} classes leave fewer than one image of each to train or to test "
            f"on with test_share {test_share}; give more images, or choose another test_share."
        )
    split = sklearn_module("model_selection").train_test_split
    _, test = split(
        list(label_of), test_size=test_share, stratify=list(label_of.values()), random_state=SPLIT_SEED, shuffle=True
    )
    is_test = set(test)
    return [row for row in rows if row.image not in is_test], [row for row in rows if row.image in is_test]


def load_data(folder: Path, question: str, test_share: float) -> Data:
    """The rows of a folder, split as it is split, or by `split_rows`.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder; give one that holds images.")
    is_split = all((folder / name).is_dir() for name in SPLITS)
    if is_split:
        train, test = (read_rows(folder / name, question) for name in SPLITS)
        if both := {row.image for row in train} & {row.image for row in test}:
            raise ValueError(f"{min(both)} is in train and in test; leave it out of one.")
    else:
        train, test = split_rows(read_rows(folder, question), test_share)
    labels = sorted({row.label for row in train})
    if len(labels) < 2:
        raise ValueError(f"{folder} has one class, {labels[0]}; give images of two or more.")
    if unknown := sorted({row.label for row in test} - set(labels)):
        raise ValueError(f"The test has classes {unknown}, which no training row has; add rows, or leave them out.")
    return Data(train, test, labels, list(dict.fromkeys(row.task for row in [*train, *test])))
