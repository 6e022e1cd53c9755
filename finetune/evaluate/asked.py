"""What is known of a question beside its text and images: what counts as right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import reference_answer
from ..rows import where_is

CHOICES = "choices"


@dataclass(frozen=True)
class Asked:
    """A question's right answers.

    Attributes:
        answers: what people answered, or one right answer.
        choices: the options of a multiple choice, in the order of their letters.
        unit: what it is a pass of, where a question is asked several times and counts once; "": it stands alone.
    """

    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    unit: str = ""


def _texts(value: Any, field: str, where: str) -> tuple[str, ...]:
    """A field's texts: strings, or mappings that hold one under `answer`, as VQA's annotations do.

    Raises:
        ValueError: naming the row.
    """
    values = [value] if isinstance(value, str) else value
    if isinstance(values, Sequence) and values:
        texts: list[Any] = [one.get("answer") if isinstance(one, Mapping) else one for one in values]
        if all(isinstance(text, str) for text in texts):
            return tuple(texts)
    raise ValueError(f"{where}: {field!r} is {repr(value)[:80]}; expected a list of texts, one at least.")


def asked_of(row: Mapping[str, Any], field: str = "answers") -> Asked:
    """What a row of chat data asks for: its field of answers where it has one, else what the assistant says last.

    Raises:
        ValueError: naming the row, if a field is not a list of texts, or there is no answer.
    """
    where = where_is(row)
    answers = (reference_answer(row),) if row.get(field) is None else _texts(row[field], field, where)
    choices = () if row.get(CHOICES) is None else _texts(row[CHOICES], CHOICES, where)
    return Asked(answers, choices)
