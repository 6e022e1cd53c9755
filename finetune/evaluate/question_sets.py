"""Questions to be put to models: rows, what counts as right, groups; from one's own data or a benchmark's files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..data import ROW, load_chat_data
from ..data_formats.checks import reading_of
from .asked import Asked, ask_rows
from .groups import Groups, group_by, group_rows
from .settings import EvaluateSettings
from .tasks import TASKS, Scoring


@dataclass(frozen=True)
class QuestionSet:
    """Questions with everything that is needed to judge answers to them.

    Attributes:
        name: of the set.
        rows: as `load_chat_data` gives them; the last message is left for the model to give.
        asked: what counts as right, per row.
        scoring: of the answers.
        groups: values to group by, per row, by what they are called.
        notes: what is to be said beside the numbers.
        max_new_tokens: of an answer, where nothing else is asked for.
        averaged: see `judging.judge`.
        ids: what each row is called in its own files; empty: they have only numbers.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    asked: Sequence[Asked]
    scoring: Scoring
    groups: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    max_new_tokens: int = 16
    averaged: Mapping[str, str] = field(default_factory=dict)
    ids: Sequence[Any] = ()

    def units(self) -> list[int]:
        """The first row of every question; questions that are asked several times count once."""
        first: dict[Any, int] = {}
        for index, one in enumerate(self.asked):
            first.setdefault(one.unit or index, index)
        return list(first.values())

    def row_groups(self) -> list[Groups]:
        """The questions in groups."""
        units = self.units()
        return [group_by(name, [values[unit] for unit in units]) for name, values in self.groups.items()]

    def limited(self, limit: int | None) -> "QuestionSet":
        """At most so many questions, evenly spaced, each with all its passes."""
        units = self.units()
        if limit is None or len(units) <= limit:
            return self
        taken = {units[place * len(units) // limit] for place in range(limit)}
        passes = {self.asked[unit].unit for unit in taken} - {""}
        kept = [index for index, one in enumerate(self.asked) if index in taken or one.unit in passes]
        return replace(
            self,
            rows=[self.rows[index] for index in kept],
            asked=[self.asked[index] for index in kept],
            groups={name: [values[index] for index in kept] for name, values in self.groups.items()},
            ids=[self.ids[index] for index in kept] if len(self.ids) else (),
            notes=(*self.notes, f"{limit} of {len(units)} questions, evenly spaced."),
        )


def question_row(text: str, image: Any, answer: str, number: int) -> dict[str, Any]:
    """A row of one question: the image in front of the text, as LLaVA-1.5 has it.

    Args:
        text: the prompt.
        image: a path, `{"path": ..., "bytes": ...}`, or None.
        answer: a right one.
        number: the row's, from 1.
    """
    parts = [] if image is None else [{"type": "image", "text": None}]
    messages = [
        {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    stored = image if isinstance(image, Mapping) or image is None else {"path": str(image), "bytes": None}
    return {"messages": messages, "images": [] if stored is None else [stored], ROW: number}


def own_questions(settings: EvaluateSettings) -> QuestionSet:
    """A task's questions, from rows of chat data.

    Raises:
        ValueError: naming the data, or the row that is wrong.
    """
    task = TASKS[str(settings.task)]
    assert settings.data is not None  # as the settings have checked
    rows = list(load_chat_data(settings.data, settings.split, **asdict(reading_of(settings))))
    if not rows:
        raise ValueError(f"The data {settings.data} holds no rows; give one or more.")
    by = settings.by
    if by is None and task.group is not None and all(row.get(task.group) is not None for row in rows):
        by = task.group
    if by is not None:
        group_rows(rows, by)  # refuses rows without one
    asked, notes = ask_rows(rows, settings.answers)
    questions = QuestionSet(
        name=str(settings.task),
        rows=rows,
        asked=asked,
        scoring=task.scoring,
        groups={} if by is None else {by: [row[by] for row in rows]},
        notes=notes,
        max_new_tokens=task.max_new_tokens,
    )
    # Right answers of the wrong kind are refused before any model is loaded.
    task.scoring.statistics([one.answers[0] for one in questions.asked], questions.asked)
    return questions
