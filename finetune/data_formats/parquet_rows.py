"""Parquet files read a few rows at a time, for streams; whole ones are `datasets`' to read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from .faults import BROKEN, DataFault

READ_AT_ONCE = 32  # rows, whose images may be large


def parquet_columns(path: str) -> list[str]:
    """The columns of a file.

    Raises:
        DataFault: if it is none.
    """
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise DataFault(f"{path} cannot be read as parquet: {error}. Write it anew.", BROKEN) from error


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | DataFault]]:
    """The rows of a file from 1 on, classes by their names; where it cannot be read, that."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            classes = {name: kind for name, kind in features.items() if isinstance(kind, ClassLabel)}
            for batch in file.iter_batches(READ_AT_ONCE):
                for number, row in enumerate(batch.to_pylist(), start=number + 1):  # noqa: B020
                    named = {
                        name: kind.int2str(row[name]) if row[name] is not None and row[name] >= 0 else None
                        for name, kind in classes.items()
                    }
                    yield number, row | named
    except (pa.ArrowException, OSError) as error:
        yield number + 1, DataFault(f"and what is behind it cannot be read: {error}. Write the file anew.", BROKEN)
