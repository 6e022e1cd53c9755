"""The names of what can be trained. No torch here: help reads them.

Every parameter of a model is of exactly one cell (see cells.py), which is of exactly one tower:

- the LLM's cells have plain names: `experts`, `routers`, `attention`, ...; all of them are `text`
- the ViT's have `vision.` before them (`vision.experts`), the connector's `connector.`; all of them are `vision`,
  `connector`
- models beside the towers (a Q-Former, an encoder of audio) are `others`

>>> sorted(cells_of("moe-layers"))[:3]
['connector.experts', 'connector.routers', 'connector.shared']
>>> most_exact("vision.experts", ["vision", "experts"])
'vision'
"""

from collections.abc import Iterable

KINDS: tuple[str, ...] = ("experts", "routers", "shared", "attention", "mlp", "norms", "embeddings", "head")
TEXT, VISION, CONNECTOR, OTHERS = "text", "vision", "connector", "others"
TOWERS: tuple[str, ...] = (TEXT, VISION, CONNECTOR)
CELLS: tuple[str, ...] = (
    *KINDS,
    *(f"{tower}.{kind}" for tower in (VISION, CONNECTOR) for kind in KINDS),
    OTHERS,
)
# What may be named: cells, towers, and all of them.
PARTS: tuple[str, ...] = (*CELLS, *TOWERS)
ALL = "all"
SPARSE_KINDS = ("experts", "routers", "shared")


def tower_of(cell: str) -> str:
    """The tower that a cell is in."""
    return TEXT if cell in KINDS else cell.partition(".")[0]


def _of_towers(*towers: str) -> tuple[str, ...]:
    return tuple(cell for cell in CELLS if tower_of(cell) in towers)


# Names for several towers or kinds. A model has some of their cells; the others are not missed.
PRESETS: dict[str, tuple[str, ...]] = {
    "moe-layers": tuple(cell for cell in CELLS if cell.rpartition(".")[2] in SPARSE_KINDS),
    "llm": _of_towers(TEXT),
    "all-but-vision": _of_towers(TEXT, CONNECTOR),
    ALL: _of_towers(*TOWERS),
}
NAMES: tuple[str, ...] = (*PARTS, *PRESETS)
# What a pattern has and a name has not.
MARKS = "*?["


def is_pattern(word: str) -> bool:
    """Whether a word is a pattern on the names of parameters: it has a wildcard, or is no name but has a dot."""
    return any(mark in word for mark in MARKS) or ("." in word and word not in NAMES)


def cells_of(name: str) -> tuple[str, ...]:
    """The cells that a name stands for."""
    if name in PRESETS:
        return PRESETS[name]
    return _of_towers(name) if name in TOWERS else (name,)


def most_exact(cell: str, names: Iterable[str]) -> str | None:
    """Of these names the one that says most exactly what a cell is: itself, then its tower; None where none does."""
    names = set(names)
    return next((name for name in (cell, tower_of(cell)) if name in names), None)
