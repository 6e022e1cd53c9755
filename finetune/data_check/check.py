"""`vlmoe data check`, top to bottom: the model's processor, the sources, every row of each, what was found."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME
from transformers.utils import logging as host_logging

from ..checkpoints import adapter_base, load_base_config, load_processor
from ..collator import chats_of
from ..sources import source_names
from .row_checks import Checked, RowCheck
from .settings import DataCheckSettings
from .sources import open_source, unnamed_images
from .tally import Tally


def load_chats(settings: DataCheckSettings) -> tuple[Any, int | None]:
    """What lays out conversations for the model, and the longest sample it takes; no weights are read.

    Raises:
        ValueError: if the model has no processor that can be used.
    """
    if settings.model is None:
        return None, None
    hub: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    if (Path(settings.model) / ADAPTER_CONFIG_NAME).is_file():
        base, revision = adapter_base(settings.model)
        config = load_base_config(base, revision, settings.trust_remote_code)
    else:
        config = load_base_config(settings.model, **hub)
    processor = load_processor(settings.model, config, **hub)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return chats_of(processor), settings.max_length or positions


def _fingerprint(row: dict[str, Any]) -> bytes:
    """What a row says and shows, in a few bytes."""
    images = [hashlib.sha1(image["bytes"]).hexdigest() if image["bytes"] else image["path"] for image in row["images"]]
    text = json.dumps([row["messages"], images], sort_keys=True)
    return hashlib.sha1(text.encode()).digest()


def _count(tally: Tally, checked: Checked, seen: set[bytes]) -> None:
    """Adds a row's images, answers and tokens."""
    tally.num_rows += 1
    if checked.row is None:
        return
    tally.num_images += len(checked.row["images"])
    tally.num_answers += sum(message["role"] == "assistant" for message in checked.row["messages"])
    tally.num_text_only += not checked.row["images"]
    tally.lengths += [] if checked.length is None else [checked.length]
    tally.num_unanswered_ends += checked.row["messages"][-1]["role"] != "assistant"
    mark = _fingerprint(checked.row)
    tally.num_repeated += mark in seen
    seen.add(mark)


def check_source(source: str, name: str, settings: DataCheckSettings, chats: Any, limit: int | None) -> Tally:
    """Goes over the rows of a source.

    Args:
        source: a file, a folder or a Hub id.
        name: what it is called.
        settings: of the run.
        chats: lays out conversations for a model; None: there is none.
        limit: the longest sample, in tokens.

    Raises:
        ValueError: if the source cannot be read at all.
    """
    rows, reader = open_source(source, settings)
    tally = Tally(name, reader.form if reader is not None else None, limit)
    check = RowCheck(reader, chats, limit) if reader is not None else None
    seen: set[bytes] = set()
    for raw in host_logging.tqdm(rows, desc=f"Checking {name}", leave=False, disable=None):
        checked = Checked([raw.fault]) if raw.fault is not None or check is None else check(raw)
        _count(tally, checked, seen)
        tally.add_faults(raw.where, checked.faults)
    if check is not None and settings.max_rows is None:
        tally.num_unnamed_images = unnamed_images(source, settings, check.opened)
    tally.is_cut = settings.max_rows is not None and tally.num_rows == settings.max_rows
    return tally


def check_data(settings: DataCheckSettings) -> list[Tally]:
    """What is wrong with each source, and how large it is.

    Raises:
        ValueError: if a source cannot be read at all, or the model cannot be used.
    """
    chats, limit = load_chats(settings)
    names = source_names(settings.data)
    return [
        check_source(source, name, settings, chats, limit) for source, name in zip(settings.data, names, strict=True)
    ]
