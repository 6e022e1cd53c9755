"""Turning dense parents into a sparse checkpoint: `upcycle(UpcycleArguments(...))`, behind `vlmoe upcycle`.

Names are looked up on first use, so that a command's help need not import torch.
"""

import sys
from importlib import import_module
from types import ModuleType

_HOMES = {"UpcycleArguments": "arguments", "ProofError": "verify", "upcycle": "upcycle"}
__all__ = list(_HOMES)


class _Package(ModuleType):
    """Keeps `upcycle` the function: importing the file `upcycle.py` would else put the module under that name."""

    def __setattr__(self, name, value):
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
