"""Which rows a batch is made of: that travels with it to the training step, and is taken out there.

It is a tensor of letters, since a batch may be made in another process, sent to another device or to other processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..rows import where_is

ROWS_KEY = "watched_rows"
WIDTH = 256  # letters that are kept of each, in bytes
MOST_NAMED = 16


def _letters(row: Any) -> list[int]:
    """What messages call a row, as a line of one width."""
    words = where_is(row) if isinstance(row, Mapping) else ""
    return list(words.encode()[:WIDTH].ljust(WIDTH, b"\0"))


class RowNotes:
    """A collator that notes beside what another one makes of rows which these are.

    Args:
        collate: the other collator.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        """The other's batch, with the letters, (rows, WIDTH), where it is a mapping."""
        batch = self.collate(rows)
        if isinstance(batch, Mapping):
            batch[ROWS_KEY] = torch.tensor([_letters(row) for row in rows], dtype=torch.uint8)  # type: ignore[index]
        return batch


def note_rows(trainer: Trainer) -> None:
    """Has the batches that a trainer trains on tell their rows; those it evaluates on do not."""
    make = trainer.get_train_dataloader

    def noted() -> Any:
        collate = trainer.data_collator
        trainer.data_collator = RowNotes(collate)
        try:
            return make()
        finally:
            trainer.data_collator = collate

    trainer.get_train_dataloader = noted  # type: ignore[method-assign]


def take_rows(inputs: Any) -> list[str]:
    """What the rows of a batch are called; the batch loses it. Empty where it is not known."""
    noted = inputs.pop(ROWS_KEY, None) if hasattr(inputs, "pop") else None
    if not isinstance(noted, Tensor):
        return []
    return [bytes(line).rstrip(b"\0").decode(errors="ignore") for line in noted.cpu().tolist()]


def _order(row: str) -> tuple[str, int]:
    """By source, then by number: "Row 12 of a.jsonl"."""
    number, _, source = row.removeprefix("Row ").partition(" of ")
    return source, int(number) if number.isdecimal() else 0


def name_rows(rows: list[str]) -> str:
    """Rows in a sentence: "rows 3, 8 and 9 of the data"."""
    sources: dict[str, list[str]] = {}
    for row in sorted(set(rows), key=_order):
        number, _, source = row.partition(" of ")
        sources.setdefault(source or "a data set that has no numbers", []).append(number.removeprefix("Row "))
    said = []
    for source, numbers in sources.items():
        shown = numbers if len(numbers) <= MOST_NAMED else [*numbers[:MOST_NAMED], f"{len(numbers) - MOST_NAMED} more"]
        words = ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
        is_numbered = all(number.isdecimal() for number in numbers)
        said.append(
            f"row{'s' if len(numbers) > 1 else ''} {words} of {source}" if is_numbered else f"rows of {source}"
        )
    return "; ".join(said) or "rows that are not known"
