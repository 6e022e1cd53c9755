"""The recipes that ship with the package, one YAML file each: `vlmoe finetune NAME`. No torch here, for help."""

from importlib.resources import files
from pathlib import Path


def shipped_recipes() -> dict[str, Path]:
    """The recipes of the package by name."""
    folder = Path(str(files(__name__)))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
