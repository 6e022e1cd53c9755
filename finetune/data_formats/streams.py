"""Rows that are read while the model trains: nothing is copied or gone over before, and no pass is held in memory.

`load_chat_stream` gives one pass through `datasets`, shuffled within a buffer. `ChatStream` goes through passes
without end, each in another order, and hands rows to a DataLoader so that neither the number of its workers nor where
a run was interrupted changes what a batch holds: every worker reads all rows and keeps those of its batches, which is
cheap, since images are opened by the collator.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset, Value
from datasets.data_files import DataFilesDict, get_data_patterns
from torch.utils.data import get_worker_info

from ..data import class_names, load_raw_split, read_loaded_row
from ..sources import source_names
from .containers import raw_rows
from .faults import DataFault
from .mixtures import SOURCE, mix_streams
from .names import AUTO
from .parquet_rows import parquet_columns
from .reading import (
    DATA_FILE,
    PARQUET,
    Reading,
    RowReader,
    columns_of,
    features_of,
    file_reader,
    place_of,
    reader_of,
    row_files,
)
from .table import find_format

NUM_LOOKED_AT = 100  # rows at the beginning of a stream, by whose columns its form is known
BUFFER = 1000


def streamed_rows(paths: Sequence[str], reader: RowReader, name: str) -> Iterator[dict[str, Any]]:
    """The rows of files, each checked, images in their place too.

    Raises:
        DataFault: naming the row.
    """
    for path in paths:
        for raw in raw_rows([path]):
            if raw.fault is not None:
                raise raw.fault
            row = reader(raw.row, raw.where)
            reader.places.check(row["images"], raw.where)
            yield _chat_columns(row) | place_of(raw, path, True) | {SOURCE: name}


def _chat_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("messages", "images")}


def streamed_loaded_row(
    row: dict[str, Any], index: int, reader: RowReader, names: dict[str, list[str]], where: str, name: str
) -> dict[str, Any]:
    """A row that `datasets` has read, checked as those of files."""
    made = read_loaded_row(row, index, reader, names, where)
    reader.places.check(made["images"], f"{where}, row {index + 1}")
    return _chat_columns(made) | {"row": index + 1, DATA_FILE: where, SOURCE: name}


def parquet_files(source: str, split: str) -> tuple[str, ...]:
    """The local parquet files of a split, as `datasets` finds them; none where there are others, or no folder."""
    path = Path(source)
    if path.is_file():
        return (os.path.abspath(path),) if path.suffix == PARQUET else ()
    if not path.is_dir():
        return ()
    try:
        folder = os.path.abspath(path)
        found = DataFilesDict.from_patterns(get_data_patterns(folder), base_path=folder)
    except FileNotFoundError:  # DatasetNotFound: there are no data at all, which load_dataset says better
        return ()
    files = tuple(map(str, found.get(split, ())))
    return files if all(file.endswith(PARQUET) for file in files) else ()


def stream_one(source: str, split: str, reading: Reading, name: str) -> IterableDataset:
    """One pass through a source.

    Raises:
        ValueError: if it cannot be read, or its rows' form is not known.
    """
    features = features_of({SOURCE: Value("string")}, num_files=2)
    if files := row_files(source, split) or parquet_files(source, split):
        columns = parquet_columns(files[0]) if files[0].endswith(PARQUET) else columns_of(files, NUM_LOOKED_AT)
        reader = file_reader(files, reading, columns)
        # A list: of several files another one comes first in each pass.
        arguments = {"paths": list(files), "reader": reader, "name": name}
        return IterableDataset.from_generator(streamed_rows, features=features, gen_kwargs=arguments)
    dataset = load_raw_split(source, split, is_streamed=True)
    reader = reader_of(reading, find_format(dataset.column_names, reading.data_format, source), source)
    known = {"reader": reader, "names": class_names(dataset), "where": f"{source}, split {split}", "name": name}
    return dataset.map(
        streamed_loaded_row,
        with_indices=True,
        fn_kwargs=known,
        remove_columns=dataset.column_names,
        features=features,
    )


def load_chat_stream(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    data_format: str = AUTO,
    image_folder: str | None = None,
    question: str | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    buffer: int = BUFFER,
) -> IterableDataset:
    """One pass through data, row by row: columns `messages`, `images` (not opened), `row`, `data_file`, `data_source`.

    Args:
        source: as of `load_chat_data`.
        split: which split, where the source is no single file.
        data_format: the form of the rows, one of `FORMAT_NAMES`; auto: by the columns of the first ones.
        image_folder: where paths of images are counted from, in the place of the data's own folder.
        question: what is asked of captioned and labelled images.
        weights: of several sources, which have to have them: how often a row is drawn from each.
        seed: of the drawing, and of the order.
        buffer: rows among which the next one is drawn; 0: they come in their order.

    Raises:
        ValueError: if it cannot be read; while it is, naming the row that is wrong.
    """
    given = [source] if isinstance(source, (str, Path)) else list(source)
    sources, reading = [str(one) for one in given], Reading(data_format, image_folder, question)
    streams = [stream_one(one, split, reading, name) for one, name in zip(sources, source_names(sources), strict=True)]
    mixed = mix_streams(streams, sources, weights, seed)
    return mixed.shuffle(seed=seed, buffer_size=buffer) if buffer else mixed


class ChatStream(torch.utils.data.IterableDataset):
    """Passes through a stream without end, for a Trainer.

    Args:
        rows: one pass, as `load_chat_stream` gives it.
        rows_per_batch: rows of a batch, those of all processes together.
        first_row: how many rows an interrupted run has trained on.
        needs_images: whether text-only rows are refused.
    """

    def __init__(self, rows: IterableDataset, rows_per_batch: int, first_row: int = 0, needs_images: bool = False):
        self.rows, self.rows_per_batch = rows, rows_per_batch
        self.first_row, self.needs_images = first_row, needs_images

    def passes(self) -> Iterator[dict[str, Any]]:
        """All rows, pass after pass.

        Raises:
            ValueError: if there are none.
        """
        # datasets (5.2) keeps the pass in memory that workers share: one that is ahead would set it for all of them.
        rows = deepcopy(self.rows)
        for number in count():
            rows.set_epoch(number)
            is_empty = True
            # Not by `iter(rows)`, which would give each worker other files.
            for batch in rows.iter(batch_size=1):
                is_empty = False
                yield {name: values[0] for name, values in batch.items()}
            if is_empty:
                raise ValueError("The data hold no rows; give one or more.")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, of_all = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index, row in enumerate(islice(self.passes(), self.first_row, None)):
            if index // self.rows_per_batch % of_all == number:
                if self.needs_images and not row["images"]:
                    raise DataFault(
                        f"Row {row['row']} of {row[DATA_FILE]} has no image, but what is trained learns from images "
                        "alone; leave text-only rows out."
                    )
                yield row

    def first(self, num_rows: int) -> list[dict[str, Any]]:
        """The rows that a new run begins with, for an estimate of its memory."""
        found = []
        self.rows.set_epoch(0)
        for batch in self.rows.iter(batch_size=1):
            found.append({name: values[0] for name, values in batch.items()})
            if len(found) == num_rows:
                break
        return found
