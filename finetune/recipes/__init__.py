"""The recipes that ship with the package, one YAML file each: `vlmoe finetune NAME`. No torch here, for help."""

from importlib.resources import files
from pathlib import Path

# What only a recipe of several stages has, at the beginning of a line.
OF_CHAINS = "\nstages:\n"


def _recipes(are_chains: bool) -> dict[str, Path]:
    folder = Path(str(files(__name__)))
    paths = sorted(folder.glob("*.yaml"))
    return {path.stem: path for path in paths if (OF_CHAINS in path.read_text(encoding="utf-8")) == are_chains}


def shipped_recipes() -> dict[str, Path]:
    """The recipes of one stage by name."""
    return _recipes(are_chains=False)


def shipped_chains() -> dict[str, Path]:
    """The recipes of several stages by name."""
    return _recipes(are_chains=True)
