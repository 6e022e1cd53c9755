"""Which parameters a run trains whole: names of parts, presets and patterns become the names of parameters.

Nothing is left frozen quietly: a name or a pattern that finds nothing is an error, as is a pattern that finds what
cannot be trained. A part or a preset stands for what can be trained of it: of a ViT not the layers behind the one that
is read, of delta experts not a base that is kept.

>>> sorted({name.split(".")[-1] for name in choose(model, ["routers"])})
['weight']
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from modeling_vlmoe.delta_experts import delta_experts

from ..settings import nearest
from .cells import parameter_cells
from .names import NAMES, PRESETS, cells_of, is_pattern
from .reach import idle_parameters

NO_GRADIENT = "no gradient reaches it: the connector reads what the ViT has before it"
KEPT_BASE = "the model's configuration keeps the base of its delta experts (train_expert_base is false)"
PACKED = "it is packed, and packed weights are not trained"


def frozen_for_good(model: Any, cells: dict[str, str]) -> dict[str, str]:
    """The parameters that cannot be trained, by name, and why."""
    found = dict.fromkeys(idle_parameters(model, cells), NO_GRADIENT)
    for path, experts in delta_experts(model):
        if not experts.is_base_trained:
            found |= {f"{path}.{name}": KEPT_BASE for name, _ in experts.named_parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            found[name] = PACKED
    return found


def _tied(model: Any) -> dict[str, str]:
    """The names of parameters that have no tensor of their own, and the name of the one they share."""
    names = {name for name, _ in model.named_parameters()}
    ids = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: ids[id(parameter)] for name, parameter in every if name not in names}


def _of_name(name: str, model: Any, cells: dict[str, str], frozen: dict[str, str]) -> set[str]:
    """The parameters that a part or a preset stands for.

    Raises:
        ValueError: if there are none, or none of them can be trained.
    """
    wanted = cells_of(name)
    found = [parameter for parameter, cell in cells.items() if cell in wanted]
    what = "preset" if name in PRESETS else "part"
    if not found:
        tied = [f" {one} is tied to {other}: name embeddings." for one, other in _tied(model).items()]
        why = tied[0] if name == "head" and tied else ""
        held = ", ".join(dict.fromkeys(cells.values()))
        raise ValueError(
            f"train names the {what} {name}, but the model has nothing of it; it has {held}.{why} Name some of these, "
            "or a model that has such."
        )
    if not (usable := set(found) - frozen.keys()):
        raise ValueError(
            f"train names the {what} {name}, of which nothing can be trained: {found[0]} stays frozen, since "
            f"{frozen[found[0]]}. Leave {name} out."
        )
    return usable


def _of_pattern(pattern: str, model: Any, cells: dict[str, str], frozen: dict[str, str]) -> set[str]:
    """The parameters that a pattern matches.

    Raises:
        ValueError: if there are none, or some that cannot be trained.
    """
    found = {name for name in cells if fnmatchcase(name, pattern)}
    if tied := {name: other for name, other in _tied(model).items() if fnmatchcase(name, pattern)}:
        name, other = next(iter(tied.items()))
        if other not in found:
            raise ValueError(f"train has {pattern!r}, but {name} is tied to {other}: name that one, for both.")
    if not found:
        below = [name for name in cells if name.startswith(f"{pattern}.")]
        hint = f" Did you mean '{pattern}.*'?" if below else nearest([pattern], [*cells, *NAMES])
        raise ValueError(
            f"train has the pattern {pattern!r}, which matches no parameter; give names as the model has them, such "
            f"as {next(iter(cells))}.{hint}"
        )
    if stuck := sorted(found & frozen.keys()):
        more = f" and {len(stuck) - 1} others" if len(stuck) > 1 else ""
        raise ValueError(
            f"train has the pattern {pattern!r}, but {stuck[0]}{more} would stay frozen: {frozen[stuck[0]]}. Narrow "
            f"the pattern, or name the part {cells[stuck[0]]}, which stands for what can be trained of it."
        )
    return found


def choose(model: Any, words: Sequence[str]) -> set[str]:
    """The names of the parameters that words stand for.

    Args:
        model: a vlmoe model, without adapters around it.
        words: names of parts and presets, and patterns on names of parameters.

    Raises:
        ValueError: naming the word that is unknown, finds nothing, or names what cannot be trained.
    """
    cells = parameter_cells(model)
    frozen, found = frozen_for_good(model, cells), set()
    for word in words:
        of_word = _of_pattern if is_pattern(word) else _of_name
        found |= of_word(word, model, cells, frozen)
    return found
