"""The conformance table, as `python -m tests.conformance` writes it to docs/router-losses.md."""

from collections.abc import Iterator
from typing import Any

from .broken import MISTAKES, SPREAD_MISTAKE, made
from .run import LOSSES, SETTINGS, Cell, measure
from .spread import SPREADS, measure_spread
from .trainers import KINDS

LIMIT = 1e-5
SMALLEST_MISTAKE = 10 * LIMIT
HEADER = """# Router losses under every trainer

Written by `python -m tests.conformance`; the tests in `tests/conformance` hold each number to its limit.

A cell is the largest relative gap |found - wanted| / |wanted| over two optimizer steps and all parameters. *Found* is
the trainer's gradient with the router losses on, less the same with them off. *Wanted* comes from plain loops over
tokens, layers and micro-batches that share no code with the model (`tests/conformance/oracle.py`). The model is sparse
in LLM, ViT and connector, its experts are unlike, its batches are padded and unequal: a step of three micro-batches,
then one of two. In every cell the task's gradient and the router losses' are both well above zero. The limit is 1e-5.

Trainers that compute the loss themselves get the one documented line, `follow_trainer(trainer)`.
"""


def rows(losses: list[str]) -> Iterator[tuple[str, str, str, Cell]]:
    """Trainer, setting, losses and cell, on one process."""
    for name in KINDS:
        for setting in SETTINGS:
            for loss in losses:
                yield name, setting, loss, measure(name, setting, loss)


def mistakes() -> Iterator[tuple[Any, Cell]]:
    """Each mistake and the cell that shows it."""
    for mistake in MISTAKES:
        measure(mistake.trainer, mistake.setting, mistake.loss)  # the run with losses off is made without the mistake
        with made(mistake):
            yield mistake, measure(mistake.trainer, mistake.setting, mistake.loss)


def render() -> str:
    """Runs everything; the page."""
    cells = {row[:3]: row[3] for row in rows(list(LOSSES))}
    lines = [HEADER]
    for loss, said in (("both", "Balance and z"), ("balance", "Balance alone"), ("z", "z alone")):
        lines += [
            f"## {said}, one process\n",
            "| | " + " | ".join(SETTINGS) + " |",
            "|---" * (len(SETTINGS) + 1) + "|",
        ]
        lines += [
            f"| {name} | " + " | ".join(f"{cells[name, setting, loss].gap:.1e}" for setting in SETTINGS) + " |"
            for name in KINDS
        ]
        lines.append("")
    spread = {said: measure_spread(how) for how, said in SPREADS.items()}
    lines += ["## Balance and z, two processes, accumulation\n", "| | " + " | ".join(spread) + " |", "|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(f"{found[name].gap:.1e}" for found in spread.values()) + " |" for name in KINDS
    ]
    lines += [
        "",
        "## Mistakes that it finds\n",
        f"Each is made on purpose; a gap below {SMALLEST_MISTAKE:.0e} would fail the tests.\n",
        "| mistake | trainer | setting | gap |",
        "|---|---|---|---|",
    ]
    lines += [f"| {one.what} | {one.trainer} | {one.setting} | {cell.gap:.1e} |" for one, cell in mistakes()]
    for how, said in SPREADS.items():
        cell = measure_spread(how, "--broken", SPREAD_MISTAKE.trainer)[SPREAD_MISTAKE.trainer]
        lines.append(f"| {SPREAD_MISTAKE.what} | {SPREAD_MISTAKE.trainer} | {said} | {cell.gap:.1e} |")
    return "\n".join(lines) + "\n"
