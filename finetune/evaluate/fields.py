"""A field of all rows that somebody asked for by name; one that a row lacks is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..rows import where_is


def field_values(rows: Sequence[Mapping[str, Any]], field: str, use: str) -> list[Any]:
    """A field's value of each row.

    Args:
        rows: the rows.
        field: its name.
        use: what cannot be done without it, as a message says it.

    Raises:
        ValueError: naming the first row without it, and the columns it has.
    """
    values = [row.get(field) for row in rows]
    without = [row for row, value in zip(rows, values, strict=True) if value is None]
    if without:
        known = ", ".join(name for name, value in without[0].items() if value is not None)
        raise ValueError(
            f"{where_is(without[0])} has no {field!r}, as {len(without)} of {len(values)}, so {use}. Its columns are "
            f"{known}; give every row one, or choose another."
        )
    return values
