"""What needs no network: logistic regression on pixels, one for each task, and the commonest class."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .data import Data, Row
from .extras import sklearn_module

MAX_ITERATIONS = 2000


def read_pixels(rows: Sequence[Row], side: int) -> np.ndarray:
    """The pixels of each row's image between 0 and 1, (rows, values): in grey where all images are, else in RGB.

    Args:
        rows: whose images.
        side: what the images are scaled to, in pixels.
    """
    opened: dict[str, Image.Image] = {}
    for row in rows:
        if row.image not in opened:
            with Image.open(row.image) as image:
                opened[row.image] = image.copy()
    mode = "L" if all(image.mode == "L" for image in opened.values()) else "RGB"
    pixels = {
        name: np.asarray(image.convert(mode).resize((side, side)), dtype=np.float32).reshape(-1) / 255
        for name, image in opened.items()
    }
    return np.stack([pixels[row.image] for row in rows])


def logistic_regression(data: Data, side: int) -> list[str]:
    """The classes that logistic regressions give the test rows: one per task, which is told the task by name.

    Args:
        data: the rows.
        side: what the images are scaled to, in pixels.
    """
    linear_model, preprocessing, pipeline = map(sklearn_module, ("linear_model", "preprocessing", "pipeline"))
    pixels = read_pixels([*data.train, *data.test], side)
    train, test = pixels[: len(data.train)], pixels[len(data.train) :]
    predicted = [""] * len(data.test)
    for task in data.tasks:
        known = [index for index, row in enumerate(data.train) if row.task == task]
        asked = [index for index, row in enumerate(data.test) if row.task == task]
        labels = [data.train[index].label for index in known]
        if not asked or len(set(labels)) < 2:  # nothing to tell apart
            found = labels[:1] * len(asked)
        else:
            model = pipeline.make_pipeline(
                preprocessing.StandardScaler(), linear_model.LogisticRegression(max_iter=MAX_ITERATIONS)
            )
            found = model.fit(train[known], labels).predict(test[asked]).tolist()
        for index, label in zip(asked, found, strict=True):
            predicted[index] = label
    return predicted


def majority(data: Data) -> list[str]:
    """The commonest training class of each test row's task; of all tasks, where it has no training row."""
    everywhere = Counter(row.label for row in data.train)
    by_task = {task: Counter(row.label for row in data.train if row.task == task) or everywhere for task in data.tasks}
    return [by_task[row.task].most_common(1)[0][0] for row in data.test]
