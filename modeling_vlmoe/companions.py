"""What travels with the weights: the receipt of the upcycling, the history of the training, the model card.

`from_pretrained` reads them once, as text, into `model.companions`, and `save_pretrained` writes those that a folder
has none of. So they survive whatever is done between: a user's own training loop, Trainer's checkpoints,
`merge_and_unload`, a process that knows the model by its remote code alone. What a folder already holds is left alone.
"""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import cached_file

RECEIPT_NAME = "upcycle_receipt.json"
HISTORY_NAME = "training_history.json"
CARD_NAME = "README.md"
CARRIED = (RECEIPT_NAME, HISTORY_NAME, CARD_NAME)
# The host's `push_to_hub` makes a card of blanks where a repository has none; this sentence of it is in no other.
HOST_CARD = "This model card has been automatically generated."
# Of `from_pretrained`'s keywords, those that say where files are.
HUB_KEYWORDS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")


def read_companions(name: str | os.PathLike[str], **kwargs: Any) -> dict[str, str]:
    """The texts that a model's folder or repository has, by file name.

    Args:
        name: as `from_pretrained` takes it.
        **kwargs: as `from_pretrained` takes them; those of `HUB_KEYWORDS` are used. Offline, only caches are read.
    """
    where = {key: kwargs[key] for key in HUB_KEYWORDS if kwargs.get(key) is not None}
    companions = {}
    for file in CARRIED:
        found = cached_file(
            os.fspath(name),
            file,
            **where,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            companions[file] = Path(found).read_text(encoding="utf-8", errors="replace")
    return companions


def write_companions(companions: dict[str, str], folder: str | os.PathLike[str]) -> None:
    """Writes the texts that a folder has none of (the host refuses a file in the place of a folder by a log line)."""
    for name, text in companions.items():
        path = Path(folder) / name
        if path.parent.is_dir() and not path.exists():
            path.write_text(text, encoding="utf-8")


def replace_host_card(companions: dict[str, str], folder: str | os.PathLike[str]) -> None:
    """Puts the model's card in the place of the blanks that the host fills a new repository with; tags are kept."""
    path = Path(folder) / CARD_NAME
    if CARD_NAME not in companions or not path.is_file():
        return
    blank = path.read_text(encoding="utf-8")
    if HOST_CARD not in blank:
        return
    text = companions[CARD_NAME]
    card, asked = ModelCard(text, ignore_metadata_errors=True), ModelCard(blank).data.get("tags") or []
    tags = card.data.get("tags") or []
    if missing := [tag for tag in asked if tag not in tags]:
        card.data["tags"] = [*tags, *missing]
        text = str(card)
    path.write_text(text, encoding="utf-8")
