"""Groups of parameters that learn at rates of their own: the host's groups, split by part.

The host makes two groups, of what decays and what does not (biases, norms). Each is split by the parts that the
settings name, so that whatever optimizer the host builds is kept, with its states, checkpoints and wrappers.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import GROUPED
from .names import cells_of, most_exact

if TYPE_CHECKING:
    from ..arguments import FinetuneArguments

PART = "part"  # a group's own word for what it is of
REST = "rest"


def has_groups(args: "FinetuneArguments") -> bool:
    """Whether parts are to learn at rates of their own."""
    return any(getattr(args, name) for name in GROUPED)


def label(cell: str, args: "FinetuneArguments") -> str:
    """The most exact of the settings' names for a cell; `REST` where none names it."""
    named = {part for name in GROUPED for part in getattr(args, name) or {}}
    return most_exact(cell, named) or REST


def value_of(part: str, given: Any) -> float | None:
    """What a setting, a mapping or None, says for a cell or a tower; None where it says nothing."""
    name = most_exact(part, given or {})
    return None if name is None else given[name]


def check_groups(trained: dict[str, bool], args: "FinetuneArguments") -> None:
    """Refuses settings for parts of which nothing is trained, or for a decay of what does not decay.

    Args:
        trained: the cells of which something is trained, and whether any of it decays.
        args: the recipe.

    Raises:
        ValueError: naming the part.
    """
    for name in GROUPED:
        given: Any = getattr(args, name) or {}
        for part in given:
            of_part = [cell for cell in trained if most_exact(cell, given) == part]
            if not of_part:
                why = "more exact names cover it" if set(cells_of(part)) & set(trained) else "it is not trained"
                raise ValueError(
                    f"{name} names {part}, but {why}: trained are {', '.join(trained)}. Leave it out of {name}, or "
                    "name it in train."
                )
            if name == "weight_decays" and given[part] and not any(trained[cell] for cell in of_part):
                raise ValueError(
                    f"weight_decays names {part}, but biases and norms do not decay, and nothing else of it is "
                    "trained. Leave it out."
                )


def split_groups(
    optimizer: torch.optim.Optimizer, cells: dict[int, str], decays: set[int], args: "FinetuneArguments"
) -> None:
    """Splits the groups of an optimizer that has made no step yet, by part.

    Args:
        optimizer: the host's.
        cells: of each trained parameter the cell, by its identity.
        decays: the identities of those that decay.
        args: the recipe.
    """
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_part: dict[tuple[str, bool], list[Tensor]] = {}
        for parameter in group["params"]:
            key = label(cells[id(parameter)], args), id(parameter) in decays
            by_part.setdefault(key, []).append(parameter)
        for (part, is_decayed), parameters in by_part.items():
            made = {**group, "params": parameters, PART: part}
            if (rate := value_of(part, args.learning_rates)) is not None:
                made["lr"] = rate
            if is_decayed and (decay := value_of(part, args.weight_decays)) is not None:
                made["weight_decay"] = decay
            split.append(made)
    # The rest first: its rate is the one that the host logs as `learning_rate`.
    optimizer.param_groups[:] = sorted(split, key=lambda group: group[PART] != REST)
