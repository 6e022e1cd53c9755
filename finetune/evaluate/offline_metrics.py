"""The tasks as metrics of `evaluate` that need no network: `metric("anls")`, or `evaluate.load(metric_path("anls"))`.

>>> metric("anls").compute(predictions=["helo"], references=[["hello", "hi"]])
{'anls': 0.8, 'count': 1}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as Several

from .asked import Asked
from .tasks import TASKS

ONE, SEVERAL = Value("string"), Several(Value("string"))


class TaskMetric(evaluate.Metric):
    """One task's measures over predictions and references.

    `compute(predictions=[...], references=[...], choices=[...])`: a reference is one text, or a list of texts (what
    people answered); `choices`, for multiple choice, a list of options per prediction. The result has the task's
    measures, and `count`.
    """

    task: str = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=TASKS[self.task].summary if self.task else "",
            citation="",
            inputs_description="predictions: texts; references: a text or a list of texts each.",
            features=[
                Features({"predictions": ONE, "references": SEVERAL}),
                Features({"predictions": ONE, "references": ONE}),
            ],
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Adds answers and what they are compared with.

        Raises:
            ValueError: if one of the two is empty, or they do not go together.
        """
        for name, given in (("predictions", predictions), ("references", references)):
            if given is not None and not len(given):
                raise ValueError(f"{name} is empty, so there are no answers to score; give one or more.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str | Sequence[str]],
        choices: Sequence[Sequence[str]] | None = None,
    ) -> dict[str, Any]:
        if choices is not None and len(choices) != len(predictions):
            raise ValueError(
                f"choices has {len(choices)} entries, but there are {len(predictions)} answers; give one list per "
                "answer."
            )
        answers = [(one,) if isinstance(one, str) else tuple(one) for one in references]
        if empty := [index for index, own in enumerate(answers) if not own]:
            raise ValueError(f"Reference {empty[0]} is empty; give one text at least.")
        asked = [
            Asked(own, tuple(choices[row]) if choices else (), where=f"Reference {row}")
            for row, own in enumerate(answers)
        ]
        scoring = TASKS[self.task].scoring
        return scoring.compute(scoring.statistics(predictions, asked)) | {"count": len(asked)}


class VQAAccuracy(TaskMetric):
    """`soft_accuracy` and `exact`."""

    task = "vqa"


class CaptionScores(TaskMetric):
    """`cider`, `bleu1` to `bleu4`, `rouge_l`; needs the extra `eval`."""

    task = "caption"


class YesNoScores(TaskMetric):
    """`accuracy`, `precision`, `recall`, `f1`, `yes_ratio`."""

    task = "yes-no"


class ANLS(TaskMetric):
    """`anls`."""

    task = "anls"


class MultipleChoice(TaskMetric):
    """`accuracy`, and the share `unread`."""

    task = "multiple-choice"


METRICS: dict[str, type[TaskMetric]] = {
    one.task: one for one in (VQAAccuracy, CaptionScores, YesNoScores, ANLS, MultipleChoice)
}


def check_task(task: str) -> str:
    """A task's name.

    Raises:
        ValueError: if there is none of that name.
    """
    if task not in TASKS:
        raise ValueError(f"There is no task {task!r}; choose one of {', '.join(TASKS)}.")
    return task


def metric(task: str, **kwargs: Any) -> TaskMetric:
    """A task's metric, for `compute_metrics` or `evaluate.combine`.

    Raises:
        ValueError: if there is no such task.
    """
    return METRICS[check_task(task)](**kwargs)


def metric_path(task: str) -> str:
    """The script that `evaluate.load` takes for a task, without a network.

    Raises:
        ValueError: if there is no such task.
    """
    return str(Path(__file__).parent / "loadable" / f"vlmoe_{check_task(task).replace('-', '_')}.py")
