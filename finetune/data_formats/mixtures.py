"""Several sources as one: all their rows, or rows drawn from each with a weight; a column says which source it is."""

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, concatenate_datasets, interleave_datasets

from ..sources import source_names

SOURCE = "data_source"
# A pass ends when every row of every source has been drawn: nothing is left out, small sources come several times.
UNTIL = "all_exhausted"


def probabilities(weights: Sequence[float], sources: Sequence[str]) -> list[float]:
    """The share of each source's rows among all that are drawn.

    Raises:
        ValueError: if there is not one weight above 0 for each.
    """
    if len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"data_weights is {list(weights)} for {len(sources)} data; give each one a finite weight above 0, in "
            "their order."
        )
    return [weight / sum(weights) for weight in weights]


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return row


def as_json(dataset: Dataset, name: str) -> Dataset:
    """A dataset one of whose columns may hold values of any type."""
    column = dataset.select_columns([name]).map(_same, features=Features({name: Json()}), desc=f"Reading {name}")
    return concatenate_datasets([dataset.remove_columns(name), column], axis=1)


def aligned(datasets: Sequence[Dataset], sources: Sequence[str]) -> list[Dataset]:
    """Datasets that can be put below one another: columns that differ in type hold values of any.

    Raises:
        ValueError: naming a source that has a column of the name that is to say the source.
    """
    kinds: dict[str, list[Any]] = {}
    for dataset, source in zip(datasets, sources, strict=True):
        if SOURCE in dataset.features:
            raise ValueError(
                f"The data {source} has a column {SOURCE}, which is to say the source; give yours another name."
            )
        for name, kind in dataset.features.items():
            kinds.setdefault(name, []).append(kind)
    unlike = [name for name, known in kinds.items() if any(kind != known[0] for kind in known)]
    found = []
    for dataset in datasets:
        for name in unlike:
            if name in dataset.features and dataset.features[name] != Json():
                dataset = as_json(dataset, name)
        found.append(dataset)
    return found


def mix(datasets: Sequence[Dataset], sources: Sequence[str], weights: Sequence[float] | None, seed: int) -> Dataset:
    """Sources as one; a column that one of them lacks is None there.

    Args:
        datasets: of chat rows.
        sources: what each was read from.
        weights: see `load_chat_data`.
        seed: of the drawing.

    Raises:
        ValueError: if they do not go together.
    """
    if not datasets:
        raise ValueError("data names no source; give one or more.")
    shares = probabilities(weights, sources) if weights else None
    named = [
        dataset.add_column(SOURCE, [name] * len(dataset))
        for dataset, name in zip(aligned(datasets, sources), source_names(sources), strict=True)
    ]
    if shares is None:
        return concatenate_datasets(named)
    return interleave_datasets(named, probabilities=shares, seed=seed, stopping_strategy=UNTIL)


def mix_streams(
    streams: Sequence[IterableDataset], sources: Sequence[str], weights: Sequence[float] | None, seed: int
) -> IterableDataset:
    """Streams as one, rows drawn from each with its weight.

    Raises:
        ValueError: without weights: how long a stream is is not known, so they cannot be mixed by that.
    """
    if len(streams) == 1 and not weights:
        return streams[0]
    if not weights:
        raise ValueError(
            f"streaming reads {len(streams)} data, of which nobody knows how long they are; give data_weights, how "
            "often a row is drawn from each."
        )
    shares = probabilities(weights, sources)
    return interleave_datasets(list(streams), probabilities=shares, seed=seed, stopping_strategy=UNTIL)
