"""Numbers of parts (`learning_rates`, `weight_decays`, `warmups`) for the dense model.

Its MLPs stand for experts and for the sparse model's own dense MLPs alike.
"""

from collections.abc import Collection, Mapping

from ..trained.checks import GROUPED, read_group
from ..trained.groups import value_of
from ..trained.names import SPARSE_KINDS, TEXT, TOWERS, tower_of

DENSE_KIND, EXPERTS = "mlp", "experts"


def kind_of(cell: str) -> str:
    """What a cell holds, whatever the tower."""
    return cell.rpartition(".")[2]


def dense_cell(cell: str) -> str:
    """The dense model's cell of the MLPs in a tower."""
    tower = tower_of(cell)
    return DENSE_KIND if tower == TEXT else f"{tower}.{DENSE_KIND}"


def of_groups(given: Mapping[str, float]) -> dict[str, float]:
    """What numbers by part are for the dense model."""
    kept = {part: value for part, value in given.items() if kind_of(part) not in SPARSE_KINDS}
    return kept | {dense_cell(part): value for part, value in given.items() if kind_of(part) == EXPERTS}


def check_one_number(name: str, given: Mapping[str, float], trained: Collection[str], where: str) -> None:
    """Refuses a number for experts that is not that of the dense MLPs trained beside them.

    Args:
        name: of the setting.
        given: what it says.
        trained: the sparse model's cells that the stage trains.
        where: the stage, for what is said.

    Raises:
        ValueError: saying how to tell which one the control takes.
    """
    for tower in TOWERS:
        experts, mlp = (kind if tower == TEXT else f"{tower}.{kind}" for kind in (EXPERTS, DENSE_KIND))
        mine, its = value_of(experts, given), value_of(mlp, given)
        if mine != its and {experts, mlp} <= set(trained):
            said = [f"{value:g}" if value is not None else "none" for value in (mine, its)]
            raise ValueError(
                f"{where} has {name} {said[0]} for {experts} and {said[1]} for {mlp}, but in the dense model both are "
                f"{mlp}. Say which its control takes: `control: {{{name}: {{{mlp}: ...}}}}` in the stage."
            )


def dense_groups(
    settings: Mapping[str, object], control: Collection[str], trained: Collection[str], where: str
) -> dict[str, dict[str, float]]:
    """A stage's numbers by part for the dense model, where they are not the sparse model's.

    Args:
        settings: those of the sparse one's stage.
        control: the settings that the stage's `control:` says itself.
        trained: the sparse model's cells that the stage trains.
        where: the stage, for what is said.

    Raises:
        ValueError: where experts and dense MLPs would need different ones.
    """
    found = {}
    for name in GROUPED:
        given = read_group(name, settings.get(name))
        if name in control or not given:
            continue
        check_one_number(name, given, trained, where)
        if (made := of_groups(given)) != given:
            found[name] = made
    return found
