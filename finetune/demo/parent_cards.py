"""A card in each of the demo's parents: the conversion reads its licence as it would that of a parent from the Hub."""

from pathlib import Path

from modeling_vlmoe.companions import CARD_NAME

LICENCE = "apache-2.0"  # this package's: the demo makes its parents of nothing else


def write_parent_card(folder: Path, what: str) -> None:
    """Writes what a parent is, and its licence."""
    text = f"---\nlicense: {LICENCE}\n---\n\n{what}, made by `vlmoe demo`.\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")
