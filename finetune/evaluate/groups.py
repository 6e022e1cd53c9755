"""Rows by a column: which group each is in, and what the worst group's gap is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .fields import field_values

MAX_GROUPS = 500  # more are no groups but names, and no table shows them


@dataclass(frozen=True)
class Groups:
    """Rows in groups.

    Attributes:
        field: the column's name.
        names: the groups, sorted.
        codes: each row's group, (rows,).
    """

    field: str
    names: tuple[str, ...]
    codes: np.ndarray


def group_by(field: str, values: Sequence[Any]) -> Groups:
    """Groups of equal values.

    Args:
        field: what the values are called.
        values: one per row.
    """
    texts = [str(value) for value in values]
    names = tuple(sorted(set(texts)))
    place = {name: code for code, name in enumerate(names)}
    return Groups(field, names, np.array([place[text] for text in texts], dtype=int))


def group_rows(rows: Sequence[Mapping[str, Any]], field: str) -> Groups:
    """Rows grouped by a column.

    Raises:
        ValueError: naming the first row without a value in that column, and the columns there are; or if it has so
            many values that they are no groups.
    """
    values = field_values(rows, field, "rows cannot be grouped by it")
    groups = group_by(field, values)
    if len(groups.names) > MAX_GROUPS:
        raise ValueError(
            f"{field!r} has {len(groups.names)} values in {len(rows)} rows; choose a field that groups them, of "
            f"{MAX_GROUPS} values at most."
        )
    return groups


def worst_group(values: Sequence[float]) -> int:
    """Which group has the lowest value."""
    return int(np.argmin(values))
