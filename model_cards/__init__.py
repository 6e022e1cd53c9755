"""Model cards, rendered from what a checkpoint's folder holds: `write_card(folder)`.

Names are looked up on first use, so that a command's help need not import torch.
"""

import sys
from importlib import import_module

_HOMES = {
    "CardFacts": "facts",
    "CardNotes": "notes",
    "is_rendered": "card",
    "keep_edited_card": "card",
    "read_facts": "facts",
    "render_card": "card",
    "write_card": "card",
    "write_notes": "notes",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
