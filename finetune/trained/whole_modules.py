"""What `train` names beside LoRA, as PEFT takes it: modules to be trained whole (`modules_to_save`)."""

from collections.abc import Sequence
from typing import Any

from .choice import choose


def _owners(names: set[str]) -> dict[str, set[str]]:
    """The paths of the modules that parameters belong to, and their parameters."""
    found: dict[str, set[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], set()).add(name)
    return found


def _check_whole(model: Any, path: str, names: set[str]) -> None:
    """Refuses a module of which PEFT would train more than is named, or that holds the whole model.

    Raises:
        ValueError: naming it.
    """
    prefix = f"{path}." if path else ""
    others = [name for name, _ in model.named_parameters() if name.startswith(prefix) and name not in names]
    if others:
        raise ValueError(
            f"train names {min(names)}, which belongs to {path or 'the model itself'}, and PEFT trains whole modules, "
            f"so {others[0]} too. Name that as well, or choose method full."
        )


def _check_tied(model: Any, names: set[str]) -> None:
    """Refuses weights that several modules share: PEFT would train a copy in one of them.

    Raises:
        ValueError: naming one.
    """
    ids = {id(parameter): name for name, parameter in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (first := ids.get(id(parameter), name)) != name:
            raise ValueError(
                f"train names {first}, which {name} shares, and beside LoRA a copy would be trained in one place. "
                "Leave it out, or choose method full."
            )


def whole_modules(model: Any, words: Sequence[str], adapted: Sequence[str], listed: Sequence[str]) -> list[str]:
    """The modules that hold what words stand for, none of them inside another.

    Args:
        model: a vlmoe model, without adapters around it.
        words: names of parts and presets, and patterns on names of parameters.
        adapted: paths of the modules and weights that get LoRA.
        listed: paths of the modules that are trained whole anyway.

    Raises:
        ValueError: as `choose`; if LoRA is on what is named; if PEFT would train more, or a copy of a tied weight.
    """
    names = {name for name in choose(model, words) if not any(name.startswith(f"{path}.") for path in listed)}
    for name in sorted(names):
        if any(name == path or name.startswith(f"{path}.") for path in adapted):
            raise ValueError(
                f"train names {name}, which gets LoRA. Take what it is of out of lora_targets or lora_parts, or out "
                "of train."
            )
    _check_tied(model, names)
    owners = sorted(_owners(names))
    outer = [path for path in owners if not any(path.startswith(f"{other}.") for other in owners if other != path)]
    for path in outer:
        below = {name for name in names if name.startswith(f"{path}.") or not path}
        _check_whole(model, path, below)
    return outer
