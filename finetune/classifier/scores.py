"""What the predictions are worth: accuracy by task with its interval, a report per class, a picture of confusions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics import share_correct
from .data import Data, Row
from .extras import new_figure, sklearn_module

REPORT, CONFUSION = "report.txt", "confusion.png"


def accuracy_by_task(
    rows: Sequence[Row], predicted: Sequence[str], tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Each task's `accuracy`, with its 95 % interval `low` and `high`, and `count`."""
    return {
        task: share_correct(
            [label == row.label for row, label in zip(rows, predicted, strict=True) if row.task == task]
        )
        for task in tasks
    }


def classes_of(data: Data, task: str, predicted: Sequence[str]) -> list[str]:
    """A task's classes, and those that were taken for one of them, in the order of all."""
    found = {row.label for row in [*data.train, *data.test] if row.task == task}
    found |= {label for row, label in zip(data.test, predicted, strict=True) if row.task == task}
    return [label for label in data.labels if label in found]


def write_report(path: Path, data: Data, predicted: Sequence[str]) -> None:
    """Writes scikit-learn's report per class, for each task."""
    report = sklearn_module("metrics").classification_report
    texts = []
    for task in data.tasks:
        pairs = [(row.label, label) for row, label in zip(data.test, predicted, strict=True) if row.task == task]
        if not pairs:
            continue
        truth, given = zip(*pairs, strict=True)
        names = classes_of(data, task, predicted)
        texts.append(f"{task}\n{report(truth, given, labels=names, digits=3, zero_division=0)}")
    path.write_text("\n".join(texts), encoding="utf-8")


def draw_confusion(path: Path, data: Data, predicted: Sequence[str]) -> None:
    """Draws scikit-learn's confusion matrix of each task, side by side."""
    display = sklearn_module("metrics").ConfusionMatrixDisplay
    tasks = [task for task in data.tasks if any(row.task == task for row in data.test)]
    figure: Any = new_figure(figsize=(5.5 * len(tasks), 5.2))
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        pairs = [(row.label, label) for row, label in zip(data.test, predicted, strict=True) if row.task == task]
        truth, given = zip(*pairs, strict=True)
        names = classes_of(data, task, predicted)
        display.from_predictions(
            truth, given, labels=names, ax=axes, colorbar=False, cmap="Blues", xticks_rotation="vertical"
        )
        num_wrong = sum(label != wanted for wanted, label in pairs)
        axes.set_title(f"{task}: {num_wrong} of {len(pairs)} wrong")
    figure.savefig(path, dpi=90)
