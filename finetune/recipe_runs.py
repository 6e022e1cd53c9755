"""A recipe run as it says: one stage or several, alone or with a dense control beside it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arguments import parse_settings, read_overrides, read_recipe
from .chain.recipe import parse_chain
from .chain.record import RECORD_NAME
from .chain.run import run_chain
from .chain.stages import STAGES
from .control.run import chain_of_one, run_with_control
from .control.settings import CONTROL_KEYS, split_control
from .heard import check_heard
from .recipes import shipped_recipes
from .settings import SETTINGS_NAME
from .train import finetune


def without_control(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values without those that are about its control."""
    return {name: value for name, value in values.items() if name not in CONTROL_KEYS}


def run_recipe(
    recipe: str | Path,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """Runs a recipe, or resumes one of several stages.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` words, in a recipe of stages also `stage.key=value`.
        flags: values that are no words: of the control.
        say: takes a line on what is under way.

    Returns:
        A line on what was written.

    Raises:
        ValueError: for whatever the user can mend.
    """
    origin = f"Recipe {recipe}"
    values, given = read_recipe(recipe), read_overrides(overrides) | dict(flags or {})
    if STAGES in given:
        raise ValueError(
            f"{STAGES} is given on the command line, but they are read from the recipe's file; write them there, and "
            "give STAGE.KEY=VALUE for a setting of one."
        )
    control, _ = split_control(values | given)
    values, given = without_control(values), without_control(given)
    if not control.with_dense_control and STAGES not in values:
        args = parse_settings(values | given, origin)
        check_heard(values, given, origin)
        args.recipe = Path(shipped_recipes().get(str(recipe), recipe)).resolve()
        return f"{finetune(args, say=say)}: done; settings in {SETTINGS_NAME}"
    if STAGES in values:
        chain = parse_chain(values, given, origin)
    else:
        chain = chain_of_one(Path(recipe).stem, values | given, origin)
        check_heard(values, given, origin)
    read = {"recipe": shipped_recipes().get(str(recipe), recipe), "dense_model": control.dense_model}
    chain = replace(chain, reads={name: str(path) for name, path in read.items() if path is not None})
    if control.with_dense_control:
        return run_with_control(chain, control, say)
    folder = run_chain(chain, say)
    return f"{folder}: done; the stages before it are in {chain.output_dir / RECORD_NAME}"
