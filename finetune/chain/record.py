"""`chain.json`: which stages have begun and which are finished, with what settings, on what. It is there whole or not.

    {"format": 1, "stages": [{"name": "align", "folder": "1-align", "state": "finished", "settings": {...},
     "inputs": {"model": "...", "data": "..."}, "result": "1-align", "weights": "..."}], "result": "5-moe-tune"}

`inputs` are fingerprints: of the weights that a stage began with, and of its data files.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from modeling_vlmoe.weight_fingerprint import fingerprint

from ..history import NOT_ABOUT_THE_MODEL
from .stages import PARENTS, Chain, Stage
from .whole_checkpoints import write_atomically

RECORD_NAME = "chain.json"
STAGE_FOLDER = re.compile(r"\d+-[A-Za-z][\w-]*")
FORMAT = 1
BEGUN, FINISHED = "begun", "finished"
# Of `vlmoe upcycle`'s settings, those that the chain sets or that `inputs` tell of.
NOT_TOLD = ("output_dir", "force", "dry_run", *PARENTS)
# Settings of a run that a finished stage may have had otherwise: they do not change what it wrote. Where images lie
# does, and how a stream goes on, though a history does not tell of it.
MAY_DIFFER = {*NOT_ABOUT_THE_MODEL, "model", "data", "eval_data"} - {"image_folder", "ignore_data_skip"}
CHUNK = 1 << 20
SUFFIXES = (".json", ".jsonl", ".parquet", ".tar", ".csv")  # of paths; a Hub id has none of them


@dataclass
class Entry:
    """What is known of a stage.

    Attributes:
        name: of the stage.
        folder: its folder's name.
        state: `BEGUN` or `FINISHED`.
        settings: that decide what it writes.
        inputs: fingerprints of what it begins with and reads.
        result: its model's folder, in the chain's.
        weights: their fingerprint, once it is finished.
    """

    name: str
    folder: str
    state: str
    settings: dict[str, Any]
    inputs: dict[str, Any]
    result: str
    weights: str | None = None


@dataclass
class Record:
    """The stages that have begun, in order.

    Attributes:
        entries: one per stage; all are finished but perhaps the last.
        result: the last stage's model, once all are finished.
    """

    entries: list[Entry] = field(default_factory=list)
    result: str | None = None


def read_record(folder: Path) -> Record:
    """The record in a chain's folder; an empty one where there is none.

    Raises:
        ValueError: if it cannot be read.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return Record()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        assert values["format"] == FORMAT
        entries = [Entry(**entry) for entry in values["stages"]]
        assert all(STAGE_FOLDER.fullmatch(entry.folder) for entry in entries)  # they may be removed
        return Record(entries, values["result"])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is not as a chain writes it: {error!r}. Remove {folder}, or name another output_dir."
        ) from error


def write_record(folder: Path, record: Record) -> None:
    """Writes the record, which is there whole or as it was before."""
    values = {"format": FORMAT, "stages": [asdict(entry) for entry in record.entries], "result": record.result}
    write_atomically(folder / RECORD_NAME, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def data_fingerprint(data: Any) -> Any:
    """What tells data from other data: a file's hash, the names and sizes of a folder's files, a Hub id as it is; of
    several sources, each one's. None for a path that is not there.
    """
    if isinstance(data, list):
        return [data_fingerprint(one) for one in data]
    path = Path(str(data)).expanduser()
    digest = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()
    if path.is_dir():
        for file_ in sorted(one for one in path.rglob("*") if one.is_file()):
            digest.update(f"{file_.relative_to(path).as_posix()} {file_.stat().st_size}\n".encode())
        return digest.hexdigest()
    return None if path.is_absolute() or path.suffix in SUFFIXES else str(data)


def model_fingerprint(model: str | None) -> str | None:
    """A folder's weights, or a Hub id as it is."""
    if model is None:
        return None
    path = Path(model).expanduser()
    return fingerprint(path) if path.is_dir() else model


def plain(values: Any) -> Any:
    """Values as JSON gives them back."""
    return json.loads(json.dumps(values))


def describe_stage(chain: Chain, stage: Stage) -> Entry:
    """A stage as it would begin, once what it begins with is there."""
    inputs: dict[str, Any] = {}
    if stage.upcycle is not None:
        told = asdict(chain.upcycling(stage))
        settings = {name: value for name, value in told.items() if name not in NOT_TOLD and value is not None}
        inputs = {name: model_fingerprint(told[name]) for name in PARENTS if told[name] is not None}
    else:
        args = chain.arguments(stage)
        settings = {name: value for name, value in args.settings().items() if name not in MAY_DIFFER}
        inputs = {"model": model_fingerprint(args.model), "data": data_fingerprint(args.data)}
        if args.eval_data is not None:
            inputs["eval_data"] = data_fingerprint(args.eval_data)
    result = stage.result.relative_to(chain.output_dir).as_posix()
    return Entry(stage.name, stage.folder.name, BEGUN, plain(settings), plain(inputs), result)


def differences(recorded: Entry, wanted: Entry) -> list[str]:
    """What a stage was told otherwise than it is told this time, in words; inputs that are gone are not compared."""
    if recorded.folder != wanted.folder:
        return [f"it was {recorded.folder}"]
    found = []
    for name in sorted({*recorded.settings, *wanted.settings}):
        before, now = recorded.settings.get(name), wanted.settings.get(name)
        if before != now:
            found.append(f"{name} was {before!r} and is {now!r}")
    for name in sorted({*recorded.inputs, *wanted.inputs}):
        before, now = recorded.inputs.get(name), wanted.inputs.get(name)
        if before != now and now is not None:
            found.append(f"{name} is not what it was")
    return found
