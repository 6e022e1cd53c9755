"""Images as the rows of `load_chat_data` hold them, opened or measured: a path, bytes, or a PIL image."""

import struct
from io import BytesIO
from typing import Any

from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

# What PIL raises on bytes that it cannot read; NotImplementedError for a DDS of a pixel format that it does not know.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    NotImplementedError,
    EOFError,
    struct.error,
    PILImage.DecompressionBombError,
)
ON_ITS_SIDE = (5, 6, 7, 8)  # EXIF's orientations that swap width and height


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
