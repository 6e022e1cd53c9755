"""What a control came to, as a table and a sentence; the card has the same."""

from collections.abc import Mapping
from typing import Any

from ..evaluate.judging import CONTROL, DIFFERENCE, THIS

HEADS = ("", "n", "sparse", "dense control", "difference")
CELLS = (THIS, CONTROL, DIFFERENCE)


def cell(values: Mapping[str, Any]) -> str:
    """A mean with its spread."""
    low, high = values["interval"]
    return f"{values['mean']:.4f} ± {values['std']:.4f} [{low:.4f} {high:.4f}]"


def control_table(found: Mapping[str, Any]) -> str:
    """A Markdown table, a line per measure.

    Args:
        found: what control.json says.
    """
    rows = [list(HEADS), ["---"] * len(HEADS)]
    rows += [
        [name, str(values["n"]), *(cell(values[column]) for column in CELLS)]
        for name, values in found["measures"].items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread_words(found: Mapping[str, Any]) -> str:
    """What the numbers behind a mean are."""
    seeds = found["seeds"]
    of = f"over {len(seeds)} seeds" if len(seeds) > 1 else f"over rows drawn again, of one seed ({seeds[0]})"
    return f"Mean ± standard deviation {of}; in brackets the 95 % interval over rows drawn again."


def match_words(found: Mapping[str, Any]) -> str:
    """What both had the same of."""
    stages = ", ".join(f"{one['name']} {one['steps']['dense']}" for one in found["stages"])
    if found["match"] == "tokens":
        return f"Both were trained on the same tokens, in the same order and schedule; steps: {stages}."
    taken = ", ".join(f"{one['name']} {one['steps']['sparse']}" for one in found["stages"])
    return (
        f"Both were trained at equal cost, counted in floating-point operations: the control took {stages} steps, the "
        f"sparse model {taken}, on the same tokens in the same order as far as the shorter goes."
    )
