"""What is known of a question beside its text and images: what counts as right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation import reference_answer
from ..rows import where_is
from .fields import field_values

ANSWERS, CHOICES = "answers", "choices"


@dataclass(frozen=True)
class Asked:
    """A question's right answers.

    Attributes:
        answers: what people answered, or one right answer.
        choices: the options of a multiple choice, in the order of their letters.
        unit: what it is a pass of, where a question is asked several times and counts once; "": it stands alone.
        where: what messages call it.
    """

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    unit: str = ""
    where: str = field(default="The answers", compare=False)


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    """A field's texts: strings, or mappings that hold one under `answer`, as VQA's annotations do.

    Raises:
        ValueError: naming the row.
    """
    values = [value] if isinstance(value, str) else value
    if isinstance(values, Sequence) and values:
        texts: list[Any] = [one.get("answer") if isinstance(one, Mapping) else one for one in values]
        if all(isinstance(text, str) for text in texts):
            return tuple(texts)
    raise ValueError(f"{where}: {name!r} is {repr(value)[:80]}; expected a list of texts, one at least.")


def asked_of(row: Mapping[str, Any], name: str = ANSWERS) -> Asked:
    """What a row of chat data asks for: its field of answers where it has one, else what the assistant says last.

    Raises:
        ValueError: naming the row, if a field is not a list of texts, or there is no answer.
    """
    where = where_is(row)
    answers = (reference_answer(row),) if row.get(name) is None else _texts(row[name], name, where)
    choices = () if row.get(CHOICES) is None else _texts(row[CHOICES], CHOICES, where)
    return Asked(answers, choices, where=where)


def ask_rows(rows: Sequence[Mapping[str, Any]], name: str | None) -> tuple[list[Asked], tuple[str, ...]]:
    """What rows ask for, and what is to be said of where their answers are from.

    Args:
        rows: of chat data.
        name: the field of answers, which every row has then; None: `answers`, in the rows that have it.

    Raises:
        ValueError: naming the row that lacks the field, or whose answers are none.
    """
    if name is not None:
        field_values(rows, name, "it gives no answers to compare with")
        return [asked_of(row, name) for row in rows], ()
    num_with = sum(row.get(ANSWERS) is not None for row in rows)
    note = (
        f"Right answers: the field {ANSWERS!r} of {num_with} of {len(rows)} rows, elsewhere what the assistant says."
    )
    return [asked_of(row) for row in rows], (note,) if 0 < num_with < len(rows) else ()
