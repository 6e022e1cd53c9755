"""Chat-format image-text data through `datasets`.

A row is `{"messages": [...], "images": [...]}`: chat messages whose user parts hold `{"type": "image"}` where an image
stands, and the images in that order, as paths relative to the file. A text-only row needs no `images`. Rows of other
forms become such rows (see `data_formats`). Images are opened only when a batch is made; everything else about a row
is checked at the start, and errors name the row.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},
                  {"role": "assistant", "content": "red"}], "images": ["images/1.png"], "kind": "colour"}
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, IterableDataset, Json, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from modeling_vlmoe import __version__

from .data_formats.image_places import ImagePlaces
from .data_formats.mixtures import mix
from .data_formats.names import AUTO
from .data_formats.reading import (
    DATA_FILE,
    IMAGES,
    PARQUET,
    READ,
    ROW,
    Reading,
    RowReader,
    chat_rows,
    columns_of,
    features_of,
    file_reader,
    reader_of,
    row_files,
)
from .data_formats.table import BY_NAME, find_format
from .image_files import image_size, open_image

__all__ = ["ROW", "check_image_files", "image_size", "load_chat_data", "load_one", "load_raw_split", "open_image"]

LOADING = (FileNotFoundError, ConnectionError, DatasetGenerationError, ValueError)
CHECKED_AT_ONCE = 1000  # rows


def generate_rows(
    paths: tuple[str, ...], reader: RowReader, extra: tuple[str, ...], stamp: tuple[Any, ...]
) -> Iterator[dict[str, Any]]:
    """The checked rows of files; by `stamp` datasets' cache knows when one of them has changed."""
    yield from chat_rows(paths, reader, extra)


def load_files(paths: tuple[str, ...], reading: Reading) -> Dataset:
    """The rows of files that are read row by row; a further column that a row lacks is None there.

    Raises:
        ValueError: naming the row that is wrong.
    """
    columns = columns_of(paths)
    reader = file_reader(paths, reading, columns)
    made = BY_NAME[reader.form].makes
    extra = tuple(name for name in columns if name not in (*READ, *made))
    stats = [Path(path).stat() for path in paths]
    # Tuples: datasets takes a list for shards, and runs the generator once for each of its members.
    arguments = {
        "paths": paths,
        "reader": reader,
        "extra": extra,
        "stamp": (*((stat.st_mtime_ns, stat.st_size) for stat in stats), __version__),
    }
    features = features_of({name: Json() for name in (*extra, *made)}, len(paths))
    try:
        dataset = Dataset.from_generator(generate_rows, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    check_image_files(dataset, reader.places, paths[0])
    return dataset


def check_image_files(dataset: Dataset, places: ImagePlaces, source: str) -> None:
    """Refuses images that are not in their place; outside the cached reading, which knows the data alone. Bytes that
    the rows hold are not read.

    Raises:
        DataFault: naming the first row.
    """
    names = [name for name in ("images", ROW, DATA_FILE) if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(CHECKED_AT_ONCE):
        images = pc.list_flatten(table["images"])
        parents = pc.list_parent_indices(table["images"]).to_pylist()
        is_file = pc.is_null(pc.struct_field(images, "bytes")).to_pylist()
        paths = pc.struct_field(images, "path").to_pylist()
        numbers = table[ROW].to_pylist()
        for parent, path in ((parents[index], paths[index]) for index, given in enumerate(is_file) if given):
            places.check([{"path": path}], f"{source}, row {numbers[parent]}")


def _reason(error: BaseException) -> str:
    """What went wrong, which `datasets` says in the error that it raises its own from."""
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
    said = str(cause or error).strip()
    return said if said.endswith((".", "!", "?")) else f"{said}."


def load_raw_split(source: str, split: str, is_streamed: bool = False) -> Any:
    """A split of an imagefolder, of parquet files or of a Hub id, as `datasets` reads it, its images not opened.

    Raises:
        ValueError: if it cannot be read.
    """
    files = {"data_files": {split: source}} if Path(source).is_file() else {}
    try:
        dataset = load_dataset(
            PARQUET.removeprefix(".") if files else source, split=split, streaming=is_streamed, **files
        )
        if is_streamed and dataset.features is None:
            dataset = dataset._resolve_features()
    except LOADING as error:
        raise ValueError(
            f"Cannot load the data {source}, split {split}: {_reason(error)} Splits are named by train_split and "
            "eval_split. Mend the data, or name others."
        ) from error
    for name, feature in (dataset.features or {}).items():
        if name in ("image", "images"):
            dataset = dataset.cast_column(name, IMAGES if is_list(feature) else Image(decode=False))
    return dataset


def is_list(feature: Any) -> bool:
    """Whether a column holds a list in each row."""
    return isinstance(feature, list) or hasattr(feature, "feature")


def class_names(dataset: Dataset | IterableDataset) -> dict[str, list[str]]:
    """The names of the classes of columns that hold their numbers."""
    features = dataset.features or {}
    return {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}


def named_classes(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """A row whose classes are called by their names; a number below 0 stands for none."""
    named = {
        name: known[row[name]] if row[name] is not None and row[name] >= 0 else None for name, known in names.items()
    }
    return {**row, **named}


def read_loaded_row(
    row: dict[str, Any], index: int, reader: RowReader, names: dict[str, list[str]], where: str
) -> dict[str, Any]:
    """A row that `datasets` has read as a chat row, with the number of its place."""
    row = named_classes(row, names)
    named = {name: row[name] for name in names}
    return named | reader(row, f"{where}, row {index + 1}") | {ROW: index + 1}


def load_split(source: str, split: str, reading: Reading) -> Dataset:
    """A split that `datasets` reads, in the form of `load_files`.

    Raises:
        ValueError: naming the row that is wrong, or the columns that are there.
    """
    dataset = load_raw_split(source, split)
    form = find_format(dataset.column_names, reading.data_format, source)
    reader = reader_of(reading, form, source)
    names = class_names(dataset)
    rest = {name: kind for name, kind in dataset.features.items() if name not in READ}
    rest |= dict.fromkeys(names, Value("string"))
    dataset = dataset.map(
        read_loaded_row,
        with_indices=True,
        fn_kwargs={"reader": reader, "names": names, "where": f"{source}, split {split}"},
        remove_columns=[name for name in ("image", "conversations") if name in dataset.column_names] or None,
        features=features_of(rest | {name: Json() for name in form.makes}),
        desc="Reading rows",
    )
    check_image_files(dataset, reader.places, f"{source}, split {split}")
    return dataset


def load_one(source: str | Path, split: str, reading: Reading) -> Dataset:
    """One source's rows; see `load_chat_data`."""
    files = row_files(str(source), split)
    return load_files(files, reading) if files else load_split(str(source), split, reading)


def load_chat_data(
    source: str | Path | Sequence[str | Path],
    split: str = "train",
    *,
    data_format: str = AUTO,
    image_folder: str | None = None,
    question: str | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Dataset:
    """Chat data with columns `messages`, `images` (not opened), `row`, and whatever else its rows carry.

    Args:
        source: a file (.jsonl, .json, .parquet, .tar); a folder that holds `<split>.jsonl` or `<split>.json`, tars,
            an imagefolder or parquet files; or a Hub id. Of several, a column `data_source` says which.
        split: which split, where the source is no single file.
        data_format: the form of the rows, one of `FORMAT_NAMES`; auto: by the columns.
        image_folder: where paths of images are counted from, in the place of the data's own folder.
        question: what is asked of captioned and labelled images.
        weights: of several sources: how often a row is drawn from each; None: all rows once, one source after the
            other.
        seed: of that drawing.

    Raises:
        ValueError: naming the file and the row that is wrong.
    """
    reading = Reading(data_format, image_folder, question)
    if isinstance(source, (str, Path)):
        if weights:
            raise ValueError("data_weights are for several data; name them, or leave data_weights out.")
        return load_one(source, split, reading)
    datasets = [load_one(one, split, reading) for one in source]
    return mix(datasets, [str(one) for one in source], weights, seed)
