"""Chat-format image-text data through `datasets`.

A row is `{"messages": [...], "images": [...]}`: chat messages whose user parts hold `{"type": "image"}` where an image
stands, and the images in that order, as paths relative to the file. A text-only row needs no `images`. Images are
opened only when a batch is made; everything else about a row is checked at the start, and errors name the row.

    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]},
                  {"role": "assistant", "content": "red"}], "images": ["images/1.png"], "kind": "colour"}
"""

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Json, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from modeling_vlmoe import __version__

IMAGES = List(Image(decode=False))
MESSAGES = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
ROLES = ("system", "user", "assistant", "tool")
# Where a row came from: the line of the file, or the place in the split, counted from 1.
ROW = "row"
# What PIL raises on bytes that it cannot read.
UNREADABLE = (OSError, SyntaxError, PILImage.DecompressionBombError)
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF's orientations that swap width and height


def text_parts(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message's content as parts, text or image placeholder.

    Raises:
        ValueError: if it is neither a string nor such parts.
    """
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f'{where}: a message\'s "content" is {content!r}; expected a string or a list of parts.')
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and not any(part.get(key) for key in ("path", "url", "image", "base64")):
            parts.append({"type": "image", "text": None})
        else:
            raise ValueError(
                f'{where}: a part of a message is {part!r}; expected {{"type": "text", "text": "..."}} or '
                '{"type": "image"}, with the images named in "images".'
            )
    return parts


def read_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """A row's messages in the one form the collator reads.

    Raises:
        ValueError: naming the row, if they are none.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where} has no "messages"; expected a list of {{"role": ..., "content": ...}}.')
    read = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'{where}: a message is {message!r}; expected {{"role": ..., "content": ...}}.')
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: a message's role is {message['role']!r}; expected one of {', '.join(ROLES)}.")
        # Arrow gives all messages of a column the same keys, None where a message has no such.
        if others := sorted(key for key in message if key not in ("role", "content") and message[key] is not None):
            raise ValueError(
                f"{where}: a message has the keys {', '.join(others)}, of which nothing would be learnt; expected "
                "role and content. Write into the content what the model is to read or say."
            )
        read.append({"role": message["role"], "content": text_parts(message, where)})
    if not any(message["role"] == "assistant" for message in read):
        raise ValueError(f"{where} has no message of the assistant, so nothing could be learnt from it. Leave it out.")
    return read


def check_image_count(messages: list[dict[str, Any]], num_images: int, where: str) -> None:
    """Refuses a row whose images are not as many as its placeholders."""
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != num_images:
        raise ValueError(
            f"{where} has {num_images} images, but {placeholders} image parts in its messages; give one "
            '{"type": "image"} per image.'
        )


def _image_paths(row: dict[str, Any], folder: Path, where: str) -> list[str]:
    """A row's images as full paths."""
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = [] if images is None else images
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f'{where}: "images" is {images!r}; expected a list of paths.')
    return [str(folder / path) for path in images]


def check_images_exist(dataset: Dataset, path: Path) -> None:
    """Refuses rows whose images are not there; outside the cached reading, which knows the JSONL file alone."""
    for row in dataset.select_columns(["images", ROW]):
        if missing := [image["path"] for image in row["images"] if not os.path.isfile(image["path"])]:
            raise ValueError(
                f"{path}, row {row[ROW]}: there is no image {', '.join(missing)}. "
                "Paths are relative to the data file; check them."
            )


def _json_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, row {number} is not UTF-8 text: {error}. Save the file as UTF-8."
                ) from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, row {number} is not valid JSON: {error}. Write one object per line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number} is {repr(row)[:80]}; expected an object.")
            yield number, row


def generate_rows(path: str, extra: tuple[str, ...], stamp: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """The checked rows of a JSONL file; by `stamp` datasets' cache knows when the file has changed."""
    for number, row in _json_rows(path):
        where = f"{path}, row {number}"
        messages = read_messages(row.get("messages"), where)
        images = _image_paths(row, Path(path).parent, where)
        check_image_count(messages, len(images), where)
        yield {"messages": messages, "images": images, ROW: number} | {name: row.get(name) for name in extra}


def load_jsonl(path: str | Path) -> Dataset:
    """A JSONL file of rows; a further column that a row lacks is None there.

    Raises:
        ValueError: naming the row that is wrong.
    """
    path = Path(path).resolve()
    columns = dict.fromkeys(name for _, row in _json_rows(str(path)) for name in row)
    if not columns:
        raise ValueError(f"{path} holds no rows. Write one JSON object per line.")
    extra = tuple(name for name in columns if name not in ("messages", "images", "image", ROW))
    features = Features(
        {"messages": MESSAGES, "images": IMAGES, ROW: Value("int64")} | {name: Json() for name in extra}
    )
    stat = path.stat()
    # A tuple: datasets takes a list for shards, and runs the generator once for each of its members.
    arguments = {"path": str(path), "extra": extra, "stamp": (stat.st_mtime_ns, stat.st_size, __version__)}
    try:
        dataset = Dataset.from_generator(generate_rows, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    check_images_exist(dataset, path)
    return dataset


def load_split(source: str, split: str) -> Dataset:
    """A split of an imagefolder, of parquet files or of a Hub id, in the form of `load_jsonl`.

    Raises:
        ValueError: naming the row that is wrong, or the column that is missing.
    """
    try:
        dataset = load_dataset(source, split=split)
    except (FileNotFoundError, ConnectionError, DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"Cannot load the data {source}, split {split}: {error} Splits are named by train_split and eval_split."
        ) from error
    if "messages" not in dataset.column_names:
        raise ValueError(f'The data {source} has columns {", ".join(dataset.column_names)}; expected "messages".')
    dataset = _undecoded(dataset)
    return dataset.map(
        _read_loaded_row,
        with_indices=True,
        fn_kwargs={"where": f"{source}, split {split}"},
        remove_columns=["image"] if "image" in dataset.column_names else None,
        features=_loaded_features(dataset),
        desc="Reading messages",
    )


def _undecoded(dataset: Dataset) -> Dataset:
    """The dataset with its images as paths or bytes, not opened."""
    for name, feature in (("image", Image(decode=False)), ("images", IMAGES)):
        if name in dataset.column_names:
            dataset = dataset.cast_column(name, feature)
    return dataset


def _loaded_features(dataset: Dataset) -> Features:
    rest = {name: kind for name, kind in dataset.features.items() if name not in ("messages", "image", "images", ROW)}
    return Features({"messages": MESSAGES, "images": IMAGES, ROW: Value("int64")} | rest)


def _read_loaded_row(row: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    where = f"{where}, row {index + 1}"
    images = row.get("images") or ([row["image"]] if row.get("image") else [])
    messages = read_messages(row["messages"], where)
    check_image_count(messages, len(images), where)
    return {"messages": messages, "images": images, ROW: index + 1}


def load_chat_data(source: str | Path, split: str = "train") -> Dataset:
    """Chat data with columns `messages`, `images` (not opened), `row`, and whatever else its rows carry.

    Args:
        source: a JSONL file; a folder that holds `<split>.jsonl`, an imagefolder or parquet files; or a Hub id.
        split: which split, where the source is no single file.

    Raises:
        ValueError: naming the file and the row that is wrong.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise ValueError(f"The data {path} is no JSONL file; expected .jsonl, or a folder.")
        return load_jsonl(path)
    if path.is_dir():
        if (path / f"{split}.jsonl").is_file():
            return load_jsonl(path / f"{split}.jsonl")
        if found := sorted(file.name for file in path.glob("*.jsonl") if file.name != "metadata.jsonl"):
            raise ValueError(f"The folder {path} has no {split}.jsonl, only {', '.join(found)}.")
    return load_split(str(source), split)


def _stored(image: Any) -> dict[str, Any]:
    return image if isinstance(image, dict) else {"path": str(image)}


def _source(stored: dict[str, Any]) -> Any:
    return BytesIO(stored["bytes"]) if stored.get("bytes") else stored["path"]


def unreadable(stored: dict[str, Any], where: str, error: Exception) -> ValueError:
    """What is said of an image that cannot be read."""
    name = stored.get("path") or "in the data"
    return ValueError(f"{where}: cannot read the image {name}: {error}. Mend it, or leave the row out.")


def image_size(image: Any, where: str) -> tuple[int, int]:
    """An image's width and height once it is upright; of a file only the head is read.

    Raises:
        ValueError: naming the row, if it is missing or unreadable.
    """
    if isinstance(image, PILImage.Image):
        return ImageOps.exif_transpose(image).size
    stored = _stored(image)
    try:
        with PILImage.open(_source(stored)) as opened:
            width, height = opened.size
            is_on_its_side = opened.getexif().get(ExifTags.Base.Orientation) in ON_ITS_SIDE
    except UNREADABLE as error:
        raise unreadable(stored, where, error) from error
    return (height, width) if is_on_its_side else (width, height)


def open_image(image: Any, where: str) -> PILImage.Image:
    """An image as PIL holds it, upright and in RGB by the processor later.

    Args:
        image: a PIL image, a path, or `{"path": ..., "bytes": ...}` as datasets stores it.
        where: the row, for messages.

    Raises:
        ValueError: naming the row, if it is missing or unreadable.
    """
    if isinstance(image, PILImage.Image):
        return image
    stored = _stored(image)
    try:
        opened = PILImage.open(_source(stored))
        opened.load()
    except UNREADABLE as error:
        raise unreadable(stored, where, error) from error
    return opened
