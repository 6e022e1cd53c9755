"""Where an image may lie: in the folder of the data file, or in the one that is named in its place.

Paths are counted from that folder. One that leaves it, by `..`, as an absolute path or over a symbolic link, is
refused: data that somebody else has made is not to read this machine's other files, and what holds on one machine is
to hold on another. An absolute path that stays inside is taken. A folder that `hf download` has filled holds links to
the repository's `blobs`: those are inside too.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import config
from huggingface_hub import constants

from .faults import MISSING, OUTSIDE, DataFault


@lru_cache(maxsize=4096)
def _resolved(folder: str) -> str:
    return os.path.realpath(folder)


def _real_path(path: str) -> str:
    """A path without links; its folder is looked up once."""
    folder, name = os.path.split(path)
    if name in ("", ".", "..") or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_resolved(folder), name)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def library_folders() -> tuple[str, ...]:
    """Where `datasets` keeps what it has downloaded and unpacked."""
    paths = constants.HF_HUB_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH
    return tuple(map(str, paths))


@dataclass(frozen=True)
class ImagePlaces:
    """The folder that images lie in.

    Attributes:
        folder: paths are counted from it; None: there is none, as of data on the Hub.
        others: further folders in which an image may lie, the library's own.
    """

    folder: str | None
    others: tuple[str, ...] = ()

    def stored(self, image: Any) -> dict[str, Any]:
        """An image as datasets stores it, its path a full one; nothing is looked at."""
        given = image if isinstance(image, Mapping) else {"path": image}
        if given.get("bytes"):
            return {"path": given.get("path"), "bytes": given["bytes"]}
        return {"path": os.path.join(self.folder or "", given["path"]), "bytes": None}

    def fault(self, stored: Mapping[str, Any], where: str) -> DataFault | None:
        """What is wrong with the place of an image: it leaves the folder, or there is none."""
        if stored.get("bytes"):
            return None
        path = stored["path"]
        roots = [_resolved(root) for root in (self.folder, *self.others) if root is not None]
        if not any(_is_inside(_real_path(path), root) for root in roots):
            return DataFault(
                f"{where}: the image {path} leaves {self.folder or 'the data'}, by .., as an absolute path or over a "
                "link. Put it there, or name the folder of the images by image_folder.",
                OUTSIDE,
            )
        if not os.path.isfile(path):
            return DataFault(
                f"{where}: there is no image {path}. Paths are relative to the data file, or to image_folder where "
                "that is given; check them.",
                MISSING,
            )
        return None

    def check(self, images: list[Mapping[str, Any]], where: str) -> None:
        """Refuses images that are not in their place.

        Raises:
            DataFault: naming the row and the first image.
        """
        for stored in images:
            if fault := self.fault(stored, where):
                raise fault


def blobs_of(folder: str) -> tuple[str, ...]:
    """Where the files are that a snapshot of the Hub's cache links to; none for another folder."""
    path = Path(folder).resolve()
    for inner in (path, *path.parents):
        blobs = inner.parent.parent / "blobs"
        if inner.parent.name == "snapshots" and blobs.is_dir():
            return (str(blobs),)
    return ()


def _places_in(folder: Path | str, others: tuple[str, ...] = ()) -> ImagePlaces:
    path = os.path.abspath(folder)
    return ImagePlaces(path, (*blobs_of(path), *others))


def places_of(source: str, image_folder: str | None = None) -> ImagePlaces:
    """The place of the images of a source.

    Args:
        source: a file, a folder, or a Hub id.
        image_folder: named in the place of the data's own folder.

    Raises:
        ValueError: if that is no folder.
    """
    if image_folder is not None:
        if not Path(image_folder).is_dir():
            raise ValueError(f"image_folder {image_folder} is no folder; give the one that images are in.")
        return _places_in(image_folder)
    path = Path(source)
    if path.is_file():
        return _places_in(path.parent)
    if path.is_dir():
        return _places_in(path, library_folders())
    return ImagePlaces(None, library_folders())
