"""A benchmark's files, read with refusals that name them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
MAX_NEW_TOKENS = 128  # LLaVA-1.5's


def need_files(folder: Path, names: Iterable[str], benchmark: str) -> None:
    """Refuses a folder that lacks files.

    Raises:
        ValueError: naming them.
    """
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(
            f"{benchmark} in {folder} is incomplete: there is no {', '.join(missing)}. Put it there, or remove the "
            "folder to leave the benchmark out."
        )


def need_images(paths: Iterable[Path], benchmark: str) -> None:
    """Refuses a benchmark some of whose images are not there.

    Raises:
        ValueError: with their number, naming one.
    """
    paths = list(paths)
    if missing := [path for path in dict.fromkeys(paths) if not path.is_file()]:
        raise ValueError(
            f"{benchmark} is incomplete: {len(missing)} of {len(set(paths))} images are not there, {missing[0]} for "
            "one. Put them there, or remove the benchmark's folder to leave it out."
        )


def read_json(path: Path) -> Any:
    """A JSON file's value.

    Raises:
        ValueError: if it is broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Download it again.") from error


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file with one per line.

    Raises:
        ValueError: naming the line that is broken.
    """
    values = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                values.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}. Download it again.") from error
    return values


def get(entry: Any, name: str, kind: type, where: str) -> Any:
    """An entry's field.

    Raises:
        ValueError: if it is not there, or of another type.
    """
    value = entry.get(name) if isinstance(entry, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(
            f"{where}: {name} is {json.dumps(value, default=str)[:60]}, expected {kind.__name__}. The file is "
            "not in the benchmark's own schema; download it again."
        )
    return value
