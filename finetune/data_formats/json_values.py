"""JSON of a user's file, with everything that may be wrong with it in one kind of error."""

import json
from typing import Any

NOT_TEXT = "holds half a character (a lone surrogate such as \\ud800). Write the character whole"
TOO_DEEP = "is nested too deeply. Write it flatter"


class JSONFault(ValueError):
    """A value that cannot be used; the message goes on behind the name of its row."""


def checked_value(value: Any) -> Any:
    """A value that was read, if it can be written again: as UTF-8, and not too deep for what reads it later.

    Raises:
        JSONFault: saying what is wrong.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise JSONFault(NOT_TEXT) from error
    except RecursionError as error:
        raise JSONFault(TOO_DEEP) from error
    return value


def read_json(text: str | bytes) -> Any:
    """The value that a text is.

    Raises:
        JSONFault: if it is none, or one that cannot be used.
    """
    try:
        return checked_value(json.loads(text))
    except JSONFault:
        raise
    except UnicodeDecodeError as error:
        raise JSONFault(f"is not UTF-8 text: {error}. Save it as UTF-8") from error
    except RecursionError as error:
        raise JSONFault(TOO_DEEP) from error
    except ValueError as error:  # among them a number of thousands of digits
        raise JSONFault(f"is not valid JSON: {error}") from error
