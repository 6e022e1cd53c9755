"""A recipe of stages, read and checked as a whole before its first stage runs.

    max_length: 2048            # settings of every training stage
    stages:
      compose:
        upcycle: {dense: true}  # the fields of `vlmoe upcycle`
      align:
        method: align           # settings of this stage
      upcycle:
        upcycle: {text_experts: 4}

Each stage begins with what the one before it wrote; the first with `text_model` and `vision_model`, `vlm_model`, or
`model`. On the command line `KEY=VALUE` is for every training stage, `STAGE.KEY=VALUE` for one stage.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from modeling_vlmoe.conversion.arguments import UpcycleArguments

from ..arguments import FinetuneArguments
from ..heard import check_heard, method_of, unheard
from ..settings import is_heard, nearest
from .one_schedule import LR_RESET, join_schedules
from .stages import CONTROL, PARENTS, STAGES, UPCYCLE, Chain, Stage

# What the chain itself says of every stage.
OWN_OF_UPCYCLE = ("output_dir", "force", "dry_run", "format")
OWN_OF_TRAINING = ("model", "output_dir", "force", "resume_from_checkpoint", "schedule_start", "schedule_steps")
OF_CHAIN = ("output_dir", "force", "model", "model_revision", *PARENTS)
NAME = re.compile(r"[A-Za-z][\w-]*")


def plain_name(name: str) -> str:
    """A stage's name or a key, as it is compared: flags have dashes where keys have underscores."""
    return name.replace("-", "_")


def known_keys(settings: type, own: Iterable[str]) -> list[str]:
    """The fields that a stage may set."""
    return [item.name for item in fields(settings) if item.init and item.name not in own]


TRAINING_KEYS = known_keys(FinetuneArguments, OWN_OF_TRAINING)
UPCYCLE_KEYS = known_keys(UpcycleArguments, (*OWN_OF_UPCYCLE, *PARENTS))
STAGE_KEYS = [*TRAINING_KEYS, UPCYCLE, CONTROL, LR_RESET]


def check_keys(keys: Iterable[Any], known: Iterable[str], own: Iterable[str], where: str) -> None:
    """Refuses keys that are not known, and those that the chain sets.

    Raises:
        ValueError: naming them, with the nearest known ones.
    """
    keys = [str(key) for key in keys]
    if taken := [key for key in keys if key in own]:
        raise ValueError(
            f"{where} sets {', '.join(taken)}, which follows from the chain: each stage has its folder in output_dir, "
            "begins with the result of the one before and goes on by itself. Leave it out."
        )
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(
            f"{where} has unknown keys: {', '.join(unknown)}."
            + (nearest(unknown, known) or " Known are those of `vlmoe finetune --help` and `vlmoe upcycle --help`.")
        )


def read_stages(given: Any, origin: str) -> dict[str, dict[str, Any]]:
    """The stages of a recipe, by name: a mapping, or a list of mappings that say `name`.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(given, list) and all(isinstance(one, Mapping) and one.get("name") for one in given):
        names = [str(one["name"]) for one in given]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{origin} has the stages {', '.join(sorted(twice))} more than once; name each its own.")
        given = {str(one["name"]): {key: value for key, value in one.items() if key != "name"} for one in given}
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{origin}: stages is no list of stages; write `stages:` and below it one `name:` per stage.")
    stages: dict[str, dict[str, Any]] = {}
    for name, values in given.items():
        if not NAME.fullmatch(str(name)):
            raise ValueError(f"{origin}: a stage is called {name!r}; expected a letter, then letters, digits or -.")
        if not isinstance(values, Mapping):
            raise ValueError(f"{origin}: stage {name} is {values!r}; expected a mapping of settings to values.")
        stages[str(name)] = copy.deepcopy(dict(values))
    return stages


def place_overrides(stages: dict[str, dict[str, Any]], overrides: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Puts `STAGE.KEY` values into their stages, and what is for all of them over what they say themselves.

    Returns:
        The values that are for the whole chain.

    Raises:
        ValueError: for a stage that is not there.
    """
    names = {plain_name(name): name for name in stages}
    shared: dict[str, Any] = {}
    for key, value in overrides.items():
        stage, dot, own = key.partition(".")
        if not dot:
            shared[key] = value
        elif plain_name(stage) not in names and stage in TRAINING_KEYS:
            raise ValueError(
                f"{origin} has no stage {stage}, but a setting of that name; give it as a mapping: "
                f'"{stage}={{{own}: {value}}}".'
            )
        elif plain_name(stage) not in names:
            raise ValueError(
                f"{origin} has no stage {stage}, which {key} is for; known are {', '.join(stages)}."
                f"{nearest([stage], stages)}"
            )
    for name, values in stages.items():
        is_upcycling = UPCYCLE in values
        target = values if not is_upcycling else values.setdefault(UPCYCLE, {})
        if not is_upcycling:
            target.update({key: value for key, value in shared.items() if key in target})
        for key, value in overrides.items():
            stage, dot, own = key.partition(".")
            if dot and names[plain_name(stage)] == name:
                if not isinstance(target, dict):
                    raise ValueError(f"{origin}: {UPCYCLE} of stage {name} is {target!r}; write a mapping there.")
                target[own] = value
    return shared


def make_stage(
    number: int, name: str, values: dict[str, Any], shared: dict[str, Any], output_dir: Path, origin: str, last: int
) -> Stage:
    """One stage, its keys checked.

    Raises:
        ValueError: naming the stage and the key.
    """
    where = f"Stage {name} of {origin}"
    upcycle, control = values.get(UPCYCLE), values.get(CONTROL) or {}
    if UPCYCLE in values:
        if not isinstance(upcycle, dict):
            raise ValueError(f"{where}: {UPCYCLE} is {upcycle!r}; expected a mapping, like {{text_experts: 4}}.")
        if training := [str(key) for key in upcycle if key in TRAINING_KEYS and key not in UPCYCLE_KEYS]:
            raise ValueError(
                f"{where} converts and trains nothing, so it has no {', '.join(training)}; give that to a stage that "
                "trains, and to this one what `vlmoe upcycle` knows."
            )
        check_keys(upcycle, UPCYCLE_KEYS, (*OWN_OF_UPCYCLE, *PARENTS), where)
        if others := [key for key in values if key != UPCYCLE]:
            raise ValueError(
                f"{where} converts, but sets {', '.join(others)}; put what `vlmoe upcycle` knows below {UPCYCLE}, and "
                "training settings into a stage of their own."
            )
        seed = {"seed": shared["seed"]} if shared.get("seed") is not None else {}
        return Stage(number, name, seed | upcycle, {}, {}, output_dir, number < last)
    check_keys(values, STAGE_KEYS, OWN_OF_TRAINING, where)
    if not isinstance(control, dict):
        raise ValueError(f"{where}: {CONTROL} is {control!r}; expected a mapping of settings, like {{train: [mlp]}}.")
    check_keys(control, TRAINING_KEYS, OWN_OF_TRAINING, f"{where}, {CONTROL},")
    method = method_of({**shared, **values})
    heard = {key: value for key, value in shared.items() if is_heard(key, method)}
    settings = heard | {key: value for key, value in values.items() if key != CONTROL}
    return Stage(number, name, None, settings, dict(control), output_dir, number < last)


def read_start(values: dict[str, Any], is_conversion: bool, origin: str) -> dict[str, Any]:
    """What the first stage begins with.

    Raises:
        ValueError: if nothing is named, too much is, or what the stage cannot begin with.
    """
    start = {name: values[name] for name in ("model", "model_revision", *PARENTS) if values.get(name)}
    model, parents = start.get("model"), [name for name in PARENTS if name in start]
    if model and parents:
        raise ValueError(f"{origin} is given a model and {', '.join(parents)}; leave one of them out.")
    if not is_conversion and parents:
        raise ValueError(
            f"{origin} is given {', '.join(parents)}, but its first stage trains; give model=, one of `vlmoe upcycle`."
        )
    if not model and not parents:
        asked = "text_model= and vision_model=, or model=" if is_conversion else "model="
        raise ValueError(f"{origin} does not say what its first stage begins with; give {asked}.")
    return start


def parse_chain(recipe: Mapping[str, Any], overrides: Mapping[str, Any], origin: str) -> Chain:
    """A chain of a recipe's values, all its stages parsed.

    Args:
        recipe: what the file says.
        overrides: `KEY` and `STAGE.KEY` to values, which come before the file's.
        origin: what messages call it.

    Raises:
        ValueError: naming the stage, and the key or the value that is wrong.
    """
    stages = read_stages(recipe.get(STAGES), origin)
    told = copy.deepcopy(stages)
    top = {key: value for key, value in recipe.items() if key != STAGES}
    shared = top | place_overrides(stages, overrides, origin)
    check_keys(
        shared, (*TRAINING_KEYS, *OF_CHAIN), ("resume_from_checkpoint", "schedule_start", "schedule_steps"), origin
    )
    if not shared.get("output_dir"):
        raise ValueError(f"{origin} does not say output_dir; give for example output_dir=tuned.")
    output_dir = Path(str(shared["output_dir"])).expanduser()
    force = shared.get("force") or False
    if force not in (True, False):
        raise ValueError(f"{origin}: force is {force!r}; expected yes or no.")
    settings = {key: value for key, value in shared.items() if key not in OF_CHAIN and value is not None}
    made = tuple(
        make_stage(number, name, values, settings, output_dir, origin, len(stages))
        for number, (name, values) in enumerate(stages.items(), 1)
    )
    start = read_start(shared, made[0].upcycle is not None, origin)
    values = {**shared, STAGES: stages}
    chain = join_schedules(Chain(origin, output_dir, start, made, force, values))
    for stage in chain.stages:
        if stage.upcycle is None:
            chain.arguments(stage)
        else:
            chain.upcycling(stage)
    check_all_heard(stages, told, settings, origin)
    return chain


def check_all_heard(
    stages: Mapping[str, Mapping[str, Any]],
    told: Mapping[str, Mapping[str, Any]],
    shared: Mapping[str, Any],
    origin: str,
) -> None:
    """Refuses settings of a stage that its method does not hear, and those for all stages that none hears.

    Args:
        stages: their values.
        told: those that the recipe says.
        shared: the values for all stages.
        origin: what messages call the recipe.

    Raises:
        ValueError: naming the stage and the settings.
    """
    method, methods = method_of(shared), []
    for name, values in stages.items():
        if UPCYCLE in values:
            continue
        given = {key: value for key, value in values.items() if key not in told[name] or told[name][key] != value}
        check_heard({"method": method, **told[name]}, given, f"Stage {name} of {origin}")
        methods.append(method_of({"method": method, **values}))
    if methods and (idle := unheard(shared, methods)):
        raise ValueError(
            f"{origin} gives {', '.join(idle)}, which none of its stages hears: they train by "
            f"{', '.join(dict.fromkeys(methods))}. Leave it out."
        )
