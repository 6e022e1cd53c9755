"""Recipes on disk: a YAML file that maps settings to values. No torch here: recipes are read before it is needed."""

from pathlib import Path
from typing import Any


def read_recipe(path: str | Path, alternatives: str = "") -> dict[str, Any]:
    """The settings of a YAML recipe.

    Args:
        path: the file.
        alternatives: what the message adds on what else could have been given, where there is no such file.

    Raises:
        ValueError: when there is no such file, or it is not a mapping.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}{alternatives}. Check the path.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML. Mend this: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a mapping of settings to values. Write one `name: value` per line.")
    return values
