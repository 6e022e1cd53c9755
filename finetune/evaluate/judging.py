"""From statistics per row to a report: measures with their spread, the control's, the difference, groups, the gap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .groups import Groups, worst_group
from .resampling import Draws, Estimate, estimate, measure_all
from .tasks import Scoring

THIS, CONTROL, DIFFERENCE = "this model", "control", "difference"


@dataclass(frozen=True)
class Line:
    """A line of a table: one measure, over all rows or a group.

    Attributes:
        label: what it is.
        count: rows.
        cells: estimates by column; a column may be missing.
    """

    label: str
    count: int
    cells: dict[str, Estimate]

    def as_dict(self) -> dict[str, Any]:
        """What a file says of it."""
        return {"n": self.count} | {name: cell.as_dict() for name, cell in self.cells.items()}


@dataclass(frozen=True)
class Group:
    """Rows of one value of a column.

    Attributes:
        name: the value.
        measures: a line per measure, the headline first.
    """

    name: str
    measures: tuple[Line, ...]

    def as_dict(self) -> dict[str, Any]:
        """What a file says of it."""
        return {line.label: line.as_dict() for line in self.measures}


@dataclass(frozen=True)
class Judged:
    """A set of questions, judged.

    Attributes:
        name: the task's or the benchmark's.
        columns: whose numbers there are, in order.
        measures: a line per measure, over all rows, the headline first; means over groups behind them.
        groups: the groups, by what the rows were grouped.
        gaps: by what they were grouped, how far the worst group is behind all rows in the headline.
        notes: what is to be said beside the numbers.
        description: the headline in words.
    """

    name: str
    columns: tuple[str, ...]
    measures: tuple[Line, ...]
    groups: dict[str, tuple[Group, ...]] = field(default_factory=dict)
    gaps: dict[str, Line] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    description: str = ""
    shows_all_by_group: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What a file says of it."""
        grouped = {
            by: {"groups": {group.name: group.as_dict() for group in groups}, "worst_group_gap": self.gap_dict(by)}
            for by, groups in self.groups.items()
        }
        measures = {line.label: line.as_dict() for line in self.measures}
        return {"metric": self.description, "measures": measures, "by": grouped, "notes": list(self.notes)}

    def gap_dict(self, by: str) -> dict[str, Any]:
        """The worst group of this model and how far it is behind."""
        gap = self.gaps[by]
        return {"group": gap.label} | gap.as_dict()


def columns_of(models: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The table's columns: each model's, and the difference where there is a control."""
    names = tuple(models)
    return (*names, DIFFERENCE) if len(names) > 1 else names


def _cells(values: np.ndarray, models: Mapping[str, Sequence[int]]) -> dict[str, Estimate]:
    """Each column's estimate, and that of the first column minus the second, pair by pair.

    Args:
        values: (models, 1 + samples).
        models: the rows of `values` of each column.
    """
    own = [values[list(members)] for members in models.values()]
    cells = dict(zip(models, map(estimate, own), strict=True))
    if len(own) > 1:
        cells[DIFFERENCE] = estimate(own[0] - own[1])
    return cells


def _gap(draws: Draws, codes: range, models: Mapping[str, Sequence[int]], names: Sequence[str]) -> Line:
    """How far this model's worst group is behind all rows, in the headline; for the others, their own worst group."""
    cells, worst = {}, 0
    for column, members in models.items():
        headline = draws.values[list(members), :, :, 0]
        place = worst_group(headline[:, 0, codes.start : codes.stop].mean(0))
        cells[column] = estimate(headline[:, :, 0] - headline[:, :, codes.start + place])
        worst = place if column == next(iter(models)) else worst
    return Line(names[worst], int(draws.counts[codes.start + worst]), cells)


def _mean_over_groups(draws: Draws, by: str, place: int, measure: str, models: Mapping[str, Sequence[int]]) -> Line:
    """A measure's mean over groups, each of the same weight."""
    values = draws.values[:, :, 1:, place]
    is_defined = ~np.isnan(values)
    num_defined = is_defined.sum(-1)
    sums = np.where(is_defined, values, 0.0).sum(-1)
    cells = _cells(np.divide(sums, num_defined, out=np.full_like(sums, np.nan), where=num_defined > 0), models)
    return Line(f"{measure}, mean over {by}", int(draws.counts[0]), cells)


def judge(
    name: str,
    scoring: Scoring,
    statistics: Mapping[str, Sequence[np.ndarray]],
    groups: Sequence[Groups] = (),
    num_samples: int = 1000,
    seed: int = 0,
    notes: Sequence[str] = (),
    averaged: Mapping[str, str] | None = None,
) -> Judged:
    """Judges models on one set of questions.

    Args:
        name: of the set.
        scoring: of its answers.
        statistics: by column, of each checkpoint, (rows, statistics). The difference is the first column minus the
            second, checkpoint by checkpoint.
        groups: of the rows, one for each column they are grouped by.
        num_samples: how often rows are drawn again.
        seed: of the drawing.
        notes: what is to be said beside the numbers.
        averaged: columns, and the measure whose mean over their groups is reported too.
    """
    flat = [one for own in statistics.values() for one in own]
    ends = np.cumsum([len(own) for own in statistics.values()])
    models = {column: range(end - len(own), end) for (column, own), end in zip(statistics.items(), ends, strict=True)}
    lines: tuple[Line, ...] = ()
    means: list[Line] = []
    by_group: dict[str, tuple[Group, ...]] = {}
    gaps: dict[str, Line] = {}

    def lines_of(draws: Draws, group: int) -> tuple[Line, ...]:
        values = draws.values[:, :, group]
        return tuple(
            Line(measure, int(draws.counts[group]), _cells(values[:, :, place], models))
            for place, measure in enumerate(scoring.measures)
        )

    for one in groups or (None,):
        codes, names = (None, ()) if one is None else (one.codes, one.names)
        draws = measure_all(scoring, flat, codes, len(names), num_samples, seed)
        lines = lines_of(draws, 0)
        if one is None:
            continue
        by_group[one.field] = tuple(Group(group, lines_of(draws, place)) for place, group in enumerate(names, start=1))
        gaps[one.field] = _gap(draws, range(1, len(names) + 1), models, names)
        if measure := (averaged or {}).get(one.field):
            place = scoring.measures.index(measure)
            means.append(_mean_over_groups(draws, one.field, place, measure, models))
    return Judged(
        name,
        columns_of(models),
        (*lines, *means),
        by_group,
        gaps,
        tuple(notes),
        scoring.description,
        scoring.shows_all_by_group,
    )
