"""The spread of measures: rows drawn again with replacement (the bootstrap; Efron, 1979), or several checkpoints.

One drawing serves every checkpoint, control and group, so that differences are paired row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .tasks import Scoring

LEVELS = (2.5, 97.5)  # percent: a 95 % interval
ROWS, CHECKPOINTS = "rows", "checkpoints"


@dataclass(frozen=True)
class Estimate:
    """A number with its spread.

    Attributes:
        mean: the measure; over several checkpoints their mean.
        std: its standard deviation over `spread_over`.
        low: the lower end of the 95 % interval over rows drawn again.
        high: the upper end.
        spread_over: "rows", or "checkpoints" where there are several.
    """

    mean: float
    std: float
    low: float
    high: float
    spread_over: str = ROWS

    def as_dict(self) -> dict[str, float | str | list[float]]:
        """What a file says of it."""
        return {
            "mean": self.mean,
            "std": self.std,
            "interval": [self.low, self.high],
            "spread_over": self.spread_over,
        }


def draw(
    statistics: np.ndarray, groups: np.ndarray, num_groups: int, num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of statistics and numbers of rows by group, of the rows as they are and of rows drawn with replacement.

    Args:
        statistics: (rows, statistics).
        groups: each row's group, counted from 0, (rows,).
        num_groups: how many groups there are.
        num_samples: how often rows are drawn; each time as many as there are.
        seed: of the drawing.

    Returns:
        Sums, (1 + samples, groups, statistics), and counts, (1 + samples, groups); the first is of the rows as they
        are.
    """
    num_rows, width = statistics.shape
    random = np.random.default_rng(seed)
    sums, counts = np.zeros((1 + num_samples, num_groups, width)), np.zeros((1 + num_samples, num_groups))
    for sample in range(1 + num_samples):
        drawn = random.integers(num_rows, size=num_rows) if sample else np.arange(num_rows)
        times = np.bincount(drawn, minlength=num_rows).astype(float)
        counts[sample] = np.bincount(groups, weights=times, minlength=num_groups)
        for column in range(width):
            weighted = times * statistics[:, column]
            sums[sample, :, column] = np.bincount(groups, weights=weighted, minlength=num_groups)
    return sums, counts


@dataclass(frozen=True)
class Draws:
    """Measures of several models on the same rows, as they are and drawn again.

    Attributes:
        values: (models, 1 + samples, 1 + groups, measures); the first of the groups is all rows. NaN where a drawing
            has no row of a group, or rows that do not define a measure which all rows do.
        counts: rows of all and of each group, (1 + groups,).
    """

    values: np.ndarray
    counts: np.ndarray


def measure_all(
    scoring: Scoring,
    statistics: Sequence[np.ndarray],
    groups: np.ndarray | None,
    num_groups: int,
    num_samples: int,
    seed: int,
) -> Draws:
    """Measures of models over all rows and over groups of them.

    Args:
        scoring: how statistics become measures.
        statistics: of each model, (rows, statistics).
        groups: each row's group, (rows,); None: there are none.
        num_groups: how many there are.
        num_samples: how often rows are drawn again.
        seed: of the drawing.
    """
    stacked = np.concatenate(statistics, axis=1)
    codes = np.zeros(len(stacked), dtype=int) if groups is None else groups
    sums, counts = draw(stacked, codes, max(num_groups, 1), num_samples, seed)
    parts = (sums, counts) if num_groups else (sums[:, :0], counts[:, :0])
    sums = np.concatenate([sums.sum(1, keepdims=True), parts[0]], axis=1)
    counts = np.concatenate([counts.sum(1, keepdims=True), parts[1]], axis=1)
    values = []
    for own in np.split(sums, len(statistics), axis=-1):
        with np.errstate(divide="ignore", invalid="ignore"):
            found = scoring.finish(own, counts)
        found = np.where(np.isnan(found[0]), 0.0, found)  # what the rows as they are do not define: see `measure`
        found[counts == 0] = np.nan
        values.append(found)
    return Draws(np.stack(values), counts[0].astype(int))


def estimate(values: np.ndarray) -> Estimate:
    """A number with its spread, over checkpoints where there are several, else over rows.

    Args:
        values: of each checkpoint, as the rows are and drawn again, (checkpoints, 1 + samples).
    """
    mean, drawn = values.mean(0), values.mean(0)[1:]
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.percentile(drawn, LEVELS) if drawn.size else (mean[0], mean[0])
    several = len(values) > 1
    if several:
        std = values[:, 0].std(ddof=1)
    else:
        std = drawn.std(ddof=1) if drawn.size > 1 else 0.0
    spread_over = CHECKPOINTS if several else ROWS
    return Estimate(float(mean[0]), float(std), float(low), float(high), spread_over)
