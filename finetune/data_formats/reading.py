"""Rows of any form become rows of chat data: what `load_chat_data`, streams and `vlmoe data check` have in common."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from .chats import check_answers_are_text, check_image_count
from .containers import PARQUET, RawRow, raw_rows, suffix_of
from .given import Row
from .image_places import ImagePlaces, places_of
from .names import AUTO, OURS
from .table import BY_NAME, RowFormat, check_format, find_format
from .tars import TAR_SUFFIXES

logger = logging.getLogger(__name__)
IMAGES = List(Image(decode=False))
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
# Where a row came from: the line of the file, or the place in the split, counted from 1; and the file, of several.
ROW, DATA_FILE = OURS
CHAT_FEATURES: Mapping[str, Any] = {"messages": MESSAGES, "images": IMAGES, ROW: Value("int64")}
# Columns that have become messages and images.
READ = ("messages", "conversations", "images", "image")
# Files of a folder that `datasets` reads or has written itself.
NO_ROWS = ("metadata.jsonl", "dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
OTHER_SPLITS = ("train", "test", "val", "dev")


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read.

    Attributes:
        data_format: the form of its rows, by name; auto: by its columns.
        image_folder: where paths of images are counted from; None: the data's folder.
        question: what captions and labels are asked by; None: the form's own.

    Raises:
        ValueError: for an unknown form.
    """

    data_format: str = AUTO
    image_folder: str | None = None
    question: str | None = None

    def __post_init__(self) -> None:
        check_format(self.data_format)
        if self.question is not None and not self.question.strip():
            raise ValueError("question is empty; give one, or leave it out.")


@dataclass(frozen=True)
class RowReader:
    """Makes chat rows of a source's rows.

    Attributes:
        form: the name of their form.
        places: where their images lie.
        question: what captions and labels are asked by.
    """

    form: str
    places: ImagePlaces
    question: str

    def __call__(self, row: Row, where: str) -> dict[str, Any]:
        """A row's messages and images, and the columns that its form makes; its images are not looked at.

        Raises:
            DataFault: naming the row.
        """
        given = BY_NAME[self.form].read(row, where, self.question)
        check_answers_are_text(given.messages, where)
        check_image_count(given.messages, len(given.images), where)
        images = [self.places.stored(image) for image in given.images]
        return {**given.added, "messages": given.messages, "images": images}


def reader_of(reading: Reading, form: RowFormat, source: str) -> RowReader:
    """What reads a source's rows.

    Raises:
        ValueError: if the folder of its images is none.
    """
    if reading.question is not None and not form.question:
        logger.warning(
            "question is given, but the rows of %s are of the form %s and bring their own; it is not asked.",
            source,
            form.name,
        )
    return RowReader(form.name, places_of(source, reading.image_folder), reading.question or form.question)


def row_files(source: str, split: str) -> tuple[str, ...]:
    """The files of a source that are read row by row; none where `datasets` finds and reads them.

    Raises:
        ValueError: if a file is of no known kind, or a folder has such files of other splits alone.
    """
    path = Path(source)
    if path.is_file():
        if suffix_of(path) is None and path.suffix != PARQUET:
            raise ValueError(
                f"The data {path} is no JSONL file; expected .jsonl, .json, .parquet or .tar, or a folder."
            )
        return (os.path.abspath(path),) if suffix_of(path) is not None else ()
    if not path.is_dir():
        return ()
    for name in (f"{split}.jsonl", f"{split}.json"):
        if (path / name).is_file():
            return (os.path.abspath(path / name),)
    if found := stray_rows(path):
        raise ValueError(
            f"The folder {path} has no {split}.jsonl or {split}.json, only {', '.join(found)}. Name one of them, "
            "or another split."
        )
    return tar_files(path, split)


def stray_rows(folder: Path) -> list[str]:
    """Files of rows that are not named by a split: without a word, images beside them would be read in their place."""
    found = {file.name for suffix in ("*.jsonl", "*.json") for file in folder.glob(suffix)} - set(NO_ROWS)
    is_read_elsewhere = all(name.endswith(".json") for name in found) and any(
        next(folder.rglob(f"*{suffix}"), None) for suffix in (*TAR_SUFFIXES, PARQUET)
    )
    return [] if is_read_elsewhere else sorted(found)


def tar_files(folder: Path, split: str) -> tuple[str, ...]:
    """The tars of a split: those whose names begin with it, or in a folder of its name; all, where none names a split.

    Raises:
        ValueError: if there are tars of other splits alone.
    """
    tars = sorted(path for suffix in TAR_SUFFIXES for path in folder.glob(f"*{suffix}"))
    inner = sorted(path for suffix in TAR_SUFFIXES for path in (folder / split).glob(f"*{suffix}"))
    named = [path for path in tars if path.name.startswith(split)] or inner
    if not named and split == "train" and not any(path.name.startswith(OTHER_SPLITS) for path in tars):
        named = tars
    if tars and not named:
        names = ", ".join(path.name for path in tars[:5])
        raise ValueError(f"The folder {folder} has no tars of the split {split}, only {names}. Name them {split}-....")
    return tuple(map(os.path.abspath, named))


def columns_of(paths: tuple[str, ...], num_rows: int | None = None) -> list[str]:
    """The columns of all rows of files, or of the first ones.

    Raises:
        DataFault: naming the first row that cannot be read.
        ValueError: if there are no rows.
    """
    columns: dict[str, None] = {}
    for raw in islice(raw_rows(paths), num_rows):
        if raw.fault is not None:
            raise raw.fault
        columns |= dict.fromkeys(raw.row)
    if not columns:
        raise ValueError(f"{paths[0]} holds no rows. Write one JSON object per line, or samples into its tar.")
    return list(columns)


def file_reader(paths: tuple[str, ...], reading: Reading, columns: list[str]) -> RowReader:
    """What reads the rows of files, whose columns are known.

    Raises:
        ValueError: if their form is not.
    """
    return reader_of(reading, find_format(columns, reading.data_format, paths[0]), paths[0])


def place_of(raw: RawRow, path: str, is_one_of_several: bool) -> dict[str, Any]:
    """Where a row came from, as columns."""
    return {ROW: raw.number} | ({DATA_FILE: Path(path).name} if is_one_of_several else {})


def chat_rows(paths: tuple[str, ...], reader: RowReader, extra: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of files as chat rows, with further columns of theirs.

    Raises:
        DataFault: naming the first row that is wrong.
    """
    for path in paths:
        for raw in raw_rows([path]):
            if raw.fault is not None:
                raise raw.fault
            rest = {name: raw.row.get(name) for name in extra}
            yield rest | reader(raw.row, raw.where) | place_of(raw, path, len(paths) > 1)


def features_of(extra: Mapping[str, Any], num_files: int = 1) -> Features:
    """The columns of chat rows, with further ones."""
    return Features({**CHAT_FEATURES, **extra, **({DATA_FILE: Value("string")} if num_files > 1 else {})})
