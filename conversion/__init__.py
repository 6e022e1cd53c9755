"""Turning dense parents into a sparse checkpoint: `upcycle(UpcycleArguments(...))`, behind `vlmoe upcycle`; to and
from transformers' own sparse models: `export(ExportArguments(...))`, `import_native(ImportArguments(...))`; and from
delta experts to whole ones and back: `densify(DensifyArguments(...))`, `compress(CompressArguments(...))`; and between
ways to route by modality: `convert_routing(ConvertRoutingArguments(...))`.

Names are looked up on first use, so that a command's help need not import torch.
"""

import sys
from importlib import import_module
from types import ModuleType

_HOMES = {
    "CompressArguments": "delta_arguments",
    "ConvertRoutingArguments": "routing_arguments",
    "DensifyArguments": "delta_arguments",
    "ExportArguments": "native_arguments",
    "ImportArguments": "native_arguments",
    "UpcycleArguments": "arguments",
    "ProofError": "gaps",
    "compress": "rewriting",
    "convert_routing": "rewriting",
    "densify": "rewriting",
    "export": "export",
    "import_native": "native_import",
    "upcycle": "upcycle",
}
__all__ = list(_HOMES)


class _Package(ModuleType):
    """Keeps `upcycle` and `export` functions: importing the files would else put the modules under these names."""

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
