"""Files of rows, read from the first to the last: JSON lines, a JSON array, tars of samples (webdataset).

Nothing is left out: what is no row comes as the fault that it is, with its place.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from .faults import BROKEN, DataFault
from .json_values import TOO_DEEP, JSONFault, checked_value, read_json
from .parquet_rows import parquet_rows
from .tars import TAR_SUFFIXES, tar_rows

ARRAY_CHUNK = 1 << 16  # characters of an array that are read at a time
SHOWN = 80


class RawRow(NamedTuple):
    """A row as its file has it.

    Attributes:
        number: of the line, or of the place in the file, from 1.
        where: what messages call it.
        row: its columns; none of a broken one.
        fault: why it cannot be read.
    """

    number: int
    where: str
    row: Mapping[str, Any]
    fault: DataFault | None = None


def _broken(number: int, where: str, said: str) -> RawRow:
    return RawRow(number, where, {}, DataFault(f"{where} {said}", BROKEN))


def _object(number: int, where: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(number, where, value)
    return _broken(number, where, f"is {repr(value)[:SHOWN]}; expected an object.")


def _element(number: int, where: str, value: Any) -> RawRow:
    """A value of an array, behind which reading goes on."""
    try:
        return _object(number, where, checked_value(value))
    except JSONFault as fault:
        return _broken(number, where, f"{fault}.")


def line_rows(path: Path) -> Iterator[RawRow]:
    """The rows of JSON lines; empty lines are none."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, row {number}"
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield _object(number, where, read_json(text))
            except UnicodeDecodeError as error:
                yield _broken(number, where, f"is not UTF-8 text: {error}. Save the file as UTF-8.")
            except JSONFault as error:
                yield _broken(number, where, f"{error}. Write one object per line.")


class _Pieces:
    """A text file of which a piece is held.

    Attributes:
        text: the piece, without white space in front.
        is_end: whether nothing comes behind it.
    """

    def __init__(self, file: TextIO):
        self.file, self.text, self.is_end = file, "", False

    def grow(self) -> None:
        """Reads on; twice as much as there is, so that a long row is not looked at often."""
        more = self.file.read(max(ARRAY_CHUNK, len(self.text)))
        self.text, self.is_end = (self.text + more).lstrip(), not more

    def take(self, mark: str) -> bool:
        """Whether a mark comes next, which is passed then."""
        while not self.text and not self.is_end:
            self.grow()
        is_next = self.text.startswith(mark)
        self.text = self.text.removeprefix(mark).lstrip()
        return is_next

    def value(self) -> Any:
        """The next value.

        Raises:
            json.JSONDecodeError: if it is none.
        """
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text)
                if end < len(self.text) or self.is_end:  # else a number may go on
                    self.text = self.text[end:].lstrip()
                    return value
            except json.JSONDecodeError:
                if self.is_end:
                    raise
            self.grow()


def array_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a JSON array, a piece of the file at a time; behind one that is broken there is no reading on."""
    number = 1
    with open(path, encoding="utf-8-sig") as file:
        pieces = _Pieces(file)
        try:
            pieces.take("[")
            while not pieces.take("]"):
                if number > 1 and not pieces.take(","):
                    raise json.JSONDecodeError("Expecting ',' or ']'", pieces.text[:SHOWN], 0)
                yield _element(number, f"{path}, row {number}", pieces.value())
                number += 1
            if not pieces.take("") or pieces.text:
                yield _broken(number, str(path), "goes on behind its array. Save one array alone.")
        except UnicodeDecodeError as error:
            yield _broken(number, f"{path}, row {number}", f"is not UTF-8 text: {error}. Save the file as UTF-8.")
        except (ValueError, RecursionError) as error:  # among them a number of thousands of digits
            what = TOO_DEEP if isinstance(error, RecursionError) else f"is not valid JSON: {error}"
            said = f"{what}. Write one array of objects; what is behind is not read."
            yield _broken(number, f"{path}, row {number}", said)


def json_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a JSON file: of its array, or of its lines where it begins with no bracket."""
    with open(path, "rb") as file:
        head = file.read(ARRAY_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()
    return array_rows(path) if head.startswith(b"[") else line_rows(path)


def sample_rows(path: Path) -> Iterator[RawRow]:
    """The samples of a tar."""
    for number, (key, sample) in enumerate(tar_rows(path), start=1):
        where = f"{path}, row {number}" + (f" ({key})" if key else "")
        if isinstance(sample, DataFault):
            yield _broken(number, where, str(sample))
        else:
            yield RawRow(number, where, sample)


def table_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a parquet file."""
    for number, row in parquet_rows(path):
        where = f"{path}, row {number}"
        yield _broken(number, where, str(row)) if isinstance(row, DataFault) else RawRow(number, where, row)


# What reads a file, by how its name ends.
READERS: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {".jsonl": line_rows, ".json": json_rows} | dict.fromkeys(
    TAR_SUFFIXES, sample_rows
)
PARQUET = ".parquet"  # read so by streams alone


def suffix_of(path: Path) -> str | None:
    """How the name of a file of rows ends; None where it is of another kind."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)


def raw_rows(paths: Iterable[str]) -> Iterator[RawRow]:
    """The rows of files of a known kind, one file after the other."""
    for path in map(Path, paths):
        suffix = suffix_of(path)
        read = table_rows if path.suffix == PARQUET else READERS[suffix or ""]
        yield from read(path)
