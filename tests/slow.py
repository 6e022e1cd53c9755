"""Which rows of a table the default run takes; `make test-slow` takes the others."""

from collections.abc import Iterable
from typing import Any

import pytest


def often(rows: Iterable[Any], *kept: Any) -> list[Any]:
    """All rows of a parameter, the slow mark on those that are not kept."""
    rows = list(rows)
    assert not (unknown := [one for one in kept if one not in rows]), unknown
    return [one if one in kept else pytest.param(one, marks=pytest.mark.slow) for one in rows]
