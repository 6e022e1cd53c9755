"""What travels with the weights: the receipt of the upcycling, the history of the training, the model card.

`from_pretrained` reads them once, as text, into `model.companions`, and `save_pretrained` writes those that a folder
has none of. So they survive whatever is done between: a user's own training loop, Trainer's checkpoints,
`merge_and_unload`, a process that knows the model by its remote code alone. What a folder already holds is left alone.

A card that was rendered tells of the weights it was rendered for, and of no others: beside other weights it is
rendered anew where the package is there to do it, and left out where it is not. A card that a person has edited always
comes along. The last line of a rendered card is a comment with the hash of all that stands above; while it holds,
nobody has edited the card.
"""

import hashlib
import json
import logging
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import cached_file

from .weight_fingerprint import fingerprint

logger = logging.getLogger(__name__)

RECEIPT_NAME = "upcycle_receipt.json"
HISTORY_NAME = "training_history.json"
CARD_NAME = "README.md"
CARRIED = (RECEIPT_NAME, HISTORY_NAME, CARD_NAME)
# The host's `push_to_hub` makes a card of blanks where a repository has none; this sentence of it is in no other.
HOST_CARD = "This model card has been automatically generated."
MARK = re.compile(r"\n<!-- rendered by vlmoe; edit what is above and it stays: ([0-9a-f]{64}) -->\n?\Z")
# Of `from_pretrained`'s keywords, those that say where files are.
HUB_KEYWORDS = ("cache_dir", "local_files_only", "token", "revision", "subfolder")


def hub_keywords(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of `from_pretrained`'s keywords, those that say where files are."""
    return {name: kwargs[name] for name in HUB_KEYWORDS if kwargs.get(name) is not None}


def digest(text: str) -> str:
    """The hash of a card's text, whatever its line ends."""
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()


def mark_rendered(text: str) -> str:
    """A rendered card with its last line, which tells whether it is as it was rendered."""
    text = f"{text.strip()}\n"
    return f"{text}\n<!-- rendered by vlmoe; edit what is above and it stays: {digest(text)} -->\n"


def is_rendered(text: str) -> bool:
    """Whether a card is as it was rendered."""
    text = text.replace("\r\n", "\n")
    mark = MARK.search(text)
    return mark is not None and mark[1] == digest(text[: mark.start()])


def read_companions(name: str | os.PathLike[str], **kwargs: Any) -> dict[str, str]:
    """The texts that a model's folder or repository has, by file name.

    Args:
        name: as `from_pretrained` takes it.
        **kwargs: as `from_pretrained` takes them; those of `HUB_KEYWORDS` are used. Offline, only caches are read.
    """
    where = hub_keywords(kwargs)
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


def recorded_weights(companions: dict[str, str]) -> str | None:
    """The fingerprint of the weights that a model's last training, else its upcycling, wrote; None if none is told."""
    try:
        runs = json.loads(companions.get(HISTORY_NAME, "[]"))
        receipt = json.loads(companions.get(RECEIPT_NAME, "{}"))
        return (runs[-1].get("weights") if runs else None) or receipt.get("weights")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None  # broken files tell nothing; rendering and training refuse them by name


def render_anew(folder: Path, repo_id: str | None = None) -> str | None:
    """The card of what a folder holds; None where the package is absent, or a file beside the weights is broken."""
    try:
        render_card = import_module("modeling_vlmoe.model_cards").render_card
    except ImportError:  # this file runs as remote code
        return None
    try:
        return render_card(folder, repo_id=repo_id)
    except ValueError as error:
        logger.warning("No model card was written: %s", error)
        return None


def card_for(companions: dict[str, str], folder: Path, repo_id: str | None = None) -> str | None:
    """The card that belongs beside the weights in a folder.

    Args:
        companions: the model's.
        folder: with weights, receipt and history.
        repo_id: the repository that they go to.
    """
    card = companions.get(CARD_NAME)
    if card is not None and not is_rendered(card):
        return card
    if card is None and RECEIPT_NAME not in companions and HISTORY_NAME not in companions:
        return None
    recorded = recorded_weights(companions)
    if card is not None and recorded is not None and recorded == fingerprint(folder):
        return card
    return render_anew(folder, repo_id)


def is_ours_to_write(card: Path) -> bool:
    """Whether a folder has no card, or one that was rendered, maybe for weights that it held before."""
    return not card.exists() or (card.is_file() and is_rendered(card.read_text(encoding="utf-8", errors="replace")))


def write_companions(companions: dict[str, str], folder: str | os.PathLike[str]) -> None:
    """Writes the receipt, the history and the card that a folder with weights has none of (the host refuses a file in
    the place of a folder by a log line).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for name in (RECEIPT_NAME, HISTORY_NAME):
        if name in companions and not (folder / name).exists():
            (folder / name).write_text(companions[name], encoding="utf-8")
    path = folder / CARD_NAME
    if not is_ours_to_write(path):
        return
    card = card_for(companions, folder)
    if card is None and path.exists():
        card = render_anew(folder)
    if card is not None:
        path.write_text(card, encoding="utf-8")
    elif path.exists():
        path.unlink()  # it was rendered for other weights


def replace_host_card(companions: dict[str, str], folder: str | os.PathLike[str], repo_id: str | None = None) -> None:
    """Puts the model's card in the place of the blanks that the host fills a new repository with, and of a card that
    was rendered for what the repository held before; tags are kept.
    """
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        return
    found = path.read_text(encoding="utf-8")
    if HOST_CARD not in found and not is_rendered(found):
        return
    text = card_for(companions, Path(folder), repo_id)
    if text is None:
        return
    card, asked = ModelCard(text, ignore_metadata_errors=True), ModelCard(found).data.get("tags") or []
    tags = card.data.get("tags") or []
    if missing := [tag for tag in asked if tag not in tags]:
        card.data["tags"] = [*tags, *missing]
        text = mark_rendered(MARK.sub("", str(card))) if is_rendered(text) else str(card)
    path.write_text(text, encoding="utf-8")
