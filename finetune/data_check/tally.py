"""What a check has counted of one source, and how it is told."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data_formats.faults import KINDS, DataFault

NUM_SHOWN = 5  # faults of each kind that are told one by one
PERCENTILES = {"least": 0, "median": 50, "95th percentile": 95, "most": 100}


@dataclass
class Tally:
    """Counts over the rows of a source.

    Attributes:
        name: of the source.
        form: of its rows.
        limit: the longest sample, in tokens; None without a model.
        is_cut: whether rows were left unread, as was asked for.
    """

    name: str
    form: str | None
    limit: int | None = None
    is_cut: bool = False
    num_rows: int = 0
    num_images: int = 0
    num_answers: int = 0
    num_text_only: int = 0
    num_repeated: int = 0
    num_unanswered_ends: int = 0
    num_unnamed_images: int = 0
    num_faulty_rows: int = 0
    lengths: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add_faults(self, where: str, faults: list[DataFault]) -> None:
        """Counts what is wrong with a row."""
        self.num_faulty_rows += bool(faults)
        for fault in faults:
            self.counts[fault.kind] += 1
            told = self.shown.setdefault(fault.kind, [])
            if len(told) < NUM_SHOWN:
                told.append((where, str(fault)))

    @property
    def num_faults(self) -> int:
        """All that is wrong."""
        return sum(self.counts.values())

    def percentiles(self) -> dict[str, int]:
        """How long the samples are, in tokens."""
        if not self.lengths:
            return {}
        return {name: int(np.percentile(self.lengths, share, method="higher")) for name, share in PERCENTILES.items()}

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "data": self.name,
            "format": self.form,
            "rows": self.num_rows,
            "only_first_rows": self.is_cut,
            "images": self.num_images,
            "answers": self.num_answers,
            "text_only_rows": self.num_text_only,
            "repeated_rows": self.num_repeated,
            "rows_without_a_last_answer": self.num_unanswered_ends,
            "images_of_no_row": self.num_unnamed_images,
            "tokens": self.percentiles(),
            "max_length": self.limit,
            "faults": {
                kind: {
                    "what": KINDS[kind],
                    "count": self.counts[kind],
                    "first": [{"row": where, "message": message} for where, message in self.shown[kind]],
                }
                for kind in KINDS
                if self.counts[kind]
            },
            "faulty_rows": self.num_faulty_rows,
        }

    def lines(self) -> list[str]:
        """The report in words."""
        share = f"{self.num_text_only / self.num_rows:.0%}" if self.num_rows else "none"
        lines = [
            f"{self.name}: {self.num_rows} rows{' (the first ones alone)' if self.is_cut else ''}"
            f"{f' of the form {self.form}' if self.form else ''}, {self.num_images} images, {self.num_answers} "
            f"answers; {self.num_text_only} rows of text alone ({share})"
        ]
        if found := self.percentiles():
            told = ", ".join(f"{name} {length}" for name, length in found.items())
            lines.append(f"  tokens of a row: {told} (limit {self.limit if self.limit is not None else 'not known'})")
        if self.num_repeated:
            lines.append(f"  note: rows that say and show what an earlier one does: {self.num_repeated}")
        if self.num_unanswered_ends:
            lines.append(
                "  note: rows whose last message is not the assistant's, which vlmoe evaluate refuses: "
                f"{self.num_unanswered_ends}"
            )
        if self.num_unnamed_images:
            lines.append(f"  note: images in the folder that no row names: {self.num_unnamed_images}")
        if not self.num_faults:
            return [*lines, "  no fault"]
        lines.append(f"  faults: {self.num_faults}, in {self.num_faulty_rows} rows")
        for kind, what in KINDS.items():
            if self.counts[kind]:
                lines.append(f"  {what}: {self.counts[kind]}")
                lines += [f"    {message}" for _, message in self.shown[kind]]
                if more := self.counts[kind] - len(self.shown[kind]):
                    lines.append(f"    and {more} more")
        return lines
