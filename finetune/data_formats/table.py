"""All forms that a row may have: by which columns each is known, and what reads it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from .captions import CAPTIONS, LABEL, read_caption, read_label
from .chat_rows import read_chat
from .conversations import TURNS, read_conversation
from .given import ANSWERS, Given, Row
from .names import AUTO, CAPTION_QUESTION, FORMAT_NAMES, LABEL_QUESTION, LOOKS, OURS
from .questions import CHOSEN, read_question


@dataclass(frozen=True)
class RowFormat:
    """A form of rows.

    Attributes:
        name: of `FORMAT_NAMES`.
        read: makes messages and images of a row: `read(row, where, question)`.
        has: columns, all of which it has.
        any_of: columns, one of which at least it has; empty: none is asked for.
        has_not: columns by which it is another form.
        is_chat: whether its conversation is written out; such a column comes before all others.
        question: what is asked where a row has no question.
        makes: the columns that `read` adds.
    """

    name: str
    read: Callable[[Row, str, str], Given]
    has: tuple[str, ...]
    any_of: tuple[str, ...] = ()
    has_not: tuple[str, ...] = ()
    is_chat: bool = False
    question: str = ""
    makes: tuple[str, ...] = ()

    def is_known_by(self, columns: Collection[str]) -> bool:
        """Whether columns are those of this form."""
        return (
            all(name in columns for name in self.has)
            and (not self.any_of or any(name in columns for name in self.any_of))
            and not any(name in columns for name in self.has_not)
        )


FORMATS = (
    RowFormat("messages", read_chat, ("messages",), is_chat=True),
    RowFormat("llava", read_conversation, (TURNS, "image"), has_not=("images",), is_chat=True),
    RowFormat("sharegpt", read_conversation, (TURNS,), has_not=("image",), is_chat=True),
    RowFormat("vqa", read_question, ("question",), any_of=(*CHOSEN, ANSWERS), makes=(ANSWERS,)),
    RowFormat("captions", read_caption, (), any_of=CAPTIONS, question=CAPTION_QUESTION, makes=(ANSWERS,)),
    RowFormat("labels", read_label, (LABEL,), any_of=("image", "images"), question=LABEL_QUESTION),
)
BY_NAME = {one.name: one for one in FORMATS}
assert tuple(BY_NAME) == tuple(LOOKS)


def check_format(name: str) -> None:
    """Refuses a form that is not known.

    Raises:
        ValueError: saying which are.
    """
    if name not in FORMAT_NAMES:
        raise ValueError(f"data_format is {name!r}; expected one of {', '.join(FORMAT_NAMES)}.")


def known_formats() -> str:
    """All forms in words."""
    return "; ".join(f"{name} ({looks})" for name, looks in LOOKS.items())


def find_format(columns: Collection[str], name: str, source: str) -> RowFormat:
    """The form of rows: the one that is asked for, or the one that the columns are of.

    Args:
        columns: of the source, those of all its rows.
        name: of `FORMAT_NAMES`.
        source: the data, for messages.

    Raises:
        ValueError: naming the columns and the forms, if none or several fit.
    """
    check_format(name)
    if taken := sorted(set(columns) & set(OURS)):
        raise ValueError(
            f"The data {source} has a column {' and a column '.join(taken)}, which is to say where a row comes from; "
            "give yours another name."
        )
    said = f"The data {source} has columns {', '.join(sorted(columns))}"
    if name != AUTO:
        form = BY_NAME[name]
        if not all(column in columns for column in form.has):
            raise ValueError(f"{said}, but data_format is {name}; expected {LOOKS[name]}.")
        return form
    fitting = [one for one in FORMATS if one.is_known_by(columns)]
    if TURNS in columns and not fitting:  # some rows in the one form, some in the other
        fitting = [one for one in FORMATS if one.has[:1] == (TURNS,)]
    fitting = [one for one in fitting if one.is_chat] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{said}, which may be {' or '.join(one.name for one in fitting)}; say which by data_format.")
    raise ValueError(f'{said}; expected "messages", or the columns of another form: {known_formats()}.')
