"""The rows of a source as they are, broken ones too, and what would read them."""

import os
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

from ..data import class_names, load_raw_split, named_classes
from ..data_formats.containers import RawRow, raw_rows
from ..data_formats.reading import Reading, RowReader, file_reader, reader_of, row_files
from ..data_formats.table import find_format
from ..data_formats.tars import IMAGE_SUFFIXES
from .settings import DataCheckSettings


def _loaded_rows(dataset: Iterable[dict], names: dict[str, list[str]]) -> Iterator[RawRow]:
    for number, row in enumerate(dataset, start=1):
        yield RawRow(number, f"row {number}", named_classes(row, names))


def _file_rows(files: tuple[str, ...]) -> Iterator[RawRow]:
    """The rows, each by the shortest name that is one."""
    for path in files:
        folder = path.rpartition("/")[0] + "/"
        for raw in raw_rows([path]):
            where = raw.where.removeprefix(folder if len(files) > 1 else f"{path}, ")
            fault = raw.fault and type(raw.fault)(str(raw.fault).replace(raw.where, where), raw.fault.kind)
            yield raw._replace(where=where, fault=fault)


def open_source(source: str, settings: DataCheckSettings) -> tuple[Iterator[RawRow], RowReader | None]:
    """A source's rows and what reads them; None where every row is broken.

    Raises:
        ValueError: if there are none, or their form is not known.
    """
    reading = Reading(settings.data_format, settings.image_folder, settings.question)
    if files := row_files(source, settings.split):
        seen = [(set(raw.row), raw.fault) for raw in islice(raw_rows(files), settings.max_rows)]
        columns = sorted(set().union(*(names for names, _ in seen)))
        if not seen:
            raise ValueError(f"The data {source} hold no rows; give one or more.")
        reader = file_reader(files, reading, columns) if columns else None
        return islice(_file_rows(files), settings.max_rows), reader
    dataset = load_raw_split(source, settings.split)
    reader = reader_of(reading, find_format(dataset.column_names, reading.data_format, source), source)
    return islice(_loaded_rows(dataset, class_names(dataset)), settings.max_rows), reader


def unnamed_images(source: str, settings: DataCheckSettings, named: Collection[str]) -> int:
    """How many images of an imagefolder no row names: `datasets` leaves them out without a word.

    Args:
        source: the folder; anything else has none.
        settings: of the run.
        named: full paths of the images of all rows.
    """
    folder = Path(source)
    if not folder.is_dir() or row_files(source, settings.split):
        return 0
    folder = folder / settings.split if (folder / settings.split).is_dir() else folder
    found = (path for path in folder.rglob("*") if path.suffix.lower().removeprefix(".") in IMAGE_SUFFIXES)
    return sum(os.path.abspath(path) not in named for path in found)
