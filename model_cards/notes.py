"""`card_notes.yaml`: what a card says that no other file of the folder knows, in the words of the model's makers.

A key that is left out is rendered as not known.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

NOTES_NAME = "card_notes.yaml"


@dataclass(frozen=True)
class CardNotes:
    """Paragraphs of Markdown.

    Attributes:
        title: the model's name; its folder's or repository's where None.
        description: what it is, beyond its parts.
        parents: what its parents are, where no Hub page says it.
        data: what it was trained on.
        intended_use: for what, and for whom.
        bias: what is known of it.
        limits: what it cannot do.
    """

    title: str | None = None
    description: str | None = None
    parents: str | None = None
    data: str | None = None
    intended_use: str | None = None
    bias: str | None = None
    limits: str | None = None


def read_notes(folder: Path) -> CardNotes:
    """The notes of a folder; empty where it has none.

    Raises:
        ValueError: naming the key that is not known, or the value that is no text.
    """
    path = folder / NOTES_NAME
    if not path.is_file():
        return CardNotes()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML; mend or remove it. {error}") from error
    known = [item.name for item in fields(CardNotes)]
    if not isinstance(values, dict) or (unknown := sorted(map(str, set(values) - set(known)))):
        what = f"has unknown keys: {', '.join(unknown)}" if isinstance(values, dict) else "is no mapping"
        raise ValueError(f"{path} {what}. Known: {', '.join(known)}.")
    if wrong := [name for name, value in values.items() if not isinstance(value, str | None)]:
        raise ValueError(f"{path}: {', '.join(wrong)} is no text. Put it in quotes.")
    return CardNotes(**values)


def write_notes(folder: Path, notes: CardNotes) -> None:
    """Writes what is said in them."""
    said = {name: value for name, value in asdict(notes).items() if value is not None}
    text = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=119)
    (folder / NOTES_NAME).write_text(text, encoding="utf-8")
