"""Tars of samples (webdataset): files with the same name up to the first dot are one sample.

    0001.json  0001.png              an object of columns, and its image
    0002.json  0002.0.png 0002.1.png two images, in the order of their names, or in that of the object's "images"
    0003.jpg   0003.txt              a caption
    0004.json                        text alone

`datasets` reads such tars too (5.2), but wants every sample to have the same files, so none of text alone.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .faults import BROKEN, MISSING, UNPLACED, DataFault
from .json_values import JSONFault, read_json

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
# Columns that a file of text makes.
TEXT_COLUMNS = {"txt": "caption", "cls": "label"}
NUMBER = re.compile(r"\d{1,9}")
NAME = re.compile(r"(?P<key>(?:.*/)?[^./]+)\.(?P<field>[^/]+)")


class _Member(tarfile.TarInfo):
    """A file of a tar, whose end is not taken for that of the tar: Python reads one that is cut off without a word."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        """As of the class above.

        Raises:
            tarfile.ReadError: if the tar stops without its end mark.
        """
        try:
            return super().fromtarfile(tar)
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it stops before its end mark") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | DataFault:
    """What a member holds, or why it is none that could be read.

    Raises:
        tarfile.ReadError: if it is cut off.
    """
    if not member.isfile():
        return DataFault(
            f"has {member.name}, which is a link or a device; write the file itself into the tar.", BROKEN
        )
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} stops in its middle")
    return content


def _files(path: Path) -> Iterator[tuple[str, str, bytes | DataFault]]:
    """Key, field and content of each file, in the tar's order; folders are none."""
    with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isdir():
                continue
            if found := NAME.fullmatch(name):
                yield found["key"], found["field"], _content(tar, member)
            else:
                said = "is of no sample: a name is one of a key, a dot and what it is (0001.png). Take it out."
                yield name, "", DataFault(said, BROKEN)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes | DataFault]]]:
    last, fields = "", dict[str, bytes | DataFault]()
    for key, field, content in _files(path):
        if key != last and fields:
            yield last, fields
            fields = {}
        last = key
        if field in fields:
            content = DataFault(f"has .{field} twice; keep one of them.", BROKEN)
        fields[field] = content
    if fields:
        yield last, fields


def _in_order(name: str) -> list[Any]:
    """Sorts 10.png behind 9.png."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]


def _named_images(key: str, images: Mapping[str, bytes], names: Any) -> list[str]:
    """The fields of the images that a sample's object names."""
    names = names if isinstance(names, list) else [names]
    found = []
    for name in names:
        field = str(name).rpartition("/")[2].removeprefix(f"{key.rpartition('/')[2]}.")
        if field not in images:
            raise DataFault(f"names the image {name}, which the sample does not hold; add it.", MISSING)
        found.append(field)
    return found


def _columns(name: str, content: bytes) -> dict[str, Any]:
    """What a file that is no image gives.

    Raises:
        DataFault: if it is none of a known kind, or cannot be read.
    """
    try:
        if name == "json":
            value = read_json(content)
            if not isinstance(value, dict):
                raise DataFault("has JSON that is no object; write one.", BROKEN)
            return value
        if name in TEXT_COLUMNS:
            text = content.decode("utf-8").strip()
            # The number of a class, as of an object's "label".
            return {TEXT_COLUMNS[name]: int(text) if name == "cls" and NUMBER.fullmatch(text) else text}
    except (UnicodeDecodeError, JSONFault) as error:
        raise DataFault(f"has a file .{name} that cannot be read: it {error}. Write it anew.", BROKEN) from error
    raise DataFault(
        f"has a file .{name}, of which nothing would be learnt; expected json, txt, cls or an image "
        f"({', '.join(IMAGE_SUFFIXES)}). Take it out.",
        BROKEN,
    )


def _row(key: str, files: Mapping[str, bytes | DataFault]) -> dict[str, Any]:
    """A sample's files as columns.

    Raises:
        DataFault: if one of them is none, or says again what another does.
    """
    row: dict[str, Any] = {}
    fields: dict[str, bytes] = {}
    for name, content in files.items():
        if isinstance(content, DataFault):
            raise content
        fields[name] = content
    images = {name: content for name, content in fields.items() if name.lower().split(".")[-1] in IMAGE_SUFFIXES}
    for name in sorted(fields.keys() - images.keys()):
        columns = _columns(name, fields[name])
        if twice := sorted(row.keys() & columns.keys()):
            raise DataFault(f"has {', '.join(twice)} in its object and in .{name}; keep one of them.", BROKEN)
        row |= columns
    column = "images" if row.get("images") else "image"
    named = row.get(column)
    order = _named_images(key, images, named) if named else sorted(images, key=_in_order)
    if left := sorted(set(images) - set(order)):
        raise DataFault(f"holds {', '.join(left)}, which its {column} do not name; name it, or take it out.", UNPLACED)
    if order:
        row.pop("images", None)
        row[column] = [{"path": f"{key}.{name}", "bytes": images[name]} for name in order]
    return row


def tar_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataFault]]:
    """Each sample's key with its columns, or with what is wrong with it."""
    try:
        for key, fields in _samples(path):
            try:
                yield key, _row(key, fields)
            except DataFault as fault:
                yield key, fault
    except (tarfile.TarError, EOFError, OSError) as error:
        yield "", DataFault(f"and what is behind it cannot be read: {error}. Write the tar anew.", BROKEN)
