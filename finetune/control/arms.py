"""The runs of a control: the sparse recipe and its dense counterpart, under each seed, each a chain of its own.

    OUT/                     the sparse model under the first seed: what the recipe is run for
    OUT/control/dense-0/     the dense one under the same seed
    OUT/control/sparse-1/    both under the next, ...

What comes before the upcycling is the same for both, and is trained once: the dense chain begins with the model that
the sparse one was upcycled from.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modeling_vlmoe.modeling_in_place import is_in_place

from ..chain.checks import Known, check_chain, check_trained_parts, is_sparse, known_of_model
from ..chain.stages import Chain, Stage
from ..settings import METHODS, is_heard
from ..train import load_datasets
from .counterparts import Counterparts, dense_settings
from .dense_start import find_start
from .settings import ControlSettings

FOLDER = "control"
SPARSE, DENSE = "sparse", "dense"
# What of a first upcycling is about the towers, and not about experts.
OF_TOWERS = ("dtype", "vision_feature_layer", "vision_feature_select_strategy", "seed")
MADE_DENSE = "dense-start"


@dataclass(frozen=True)
class Pair:
    """Both chains under one seed.

    Attributes:
        seed: theirs.
        sparse: the recipe's.
        dense: the control's.
        shared: by the number of a stage of the control, that of the sparse stage that it stands for.
        differs: by the name of such a stage, the settings that differ.
    """

    seed: int
    sparse: Chain
    dense: Chain
    shared: dict[int, int]
    differs: dict[str, dict[str, Any]]


def with_seed(chain: Chain, seed: int, own_seed: int, output_dir: Path) -> Chain:
    """A chain under another seed, in a folder of its own; under its own seed its conversions keep what they draw."""

    def seeded(stage: Stage) -> Stage:
        if stage.upcycle is not None:
            drawn = stage.upcycle if seed == own_seed else stage.upcycle | {"seed": seed}
            return replace(stage, upcycle=drawn, output_dir=output_dir)
        return replace(stage, settings=stage.settings | {"seed": seed}, output_dir=output_dir)

    return replace(chain, output_dir=output_dir, stages=tuple(map(seeded, chain.stages)))


def check_one_seed(chain: Chain) -> None:
    """Refuses seeds of single stages where `control_seeds` gives all stages one.

    Raises:
        ValueError: naming the stages.
    """
    seeds = {stage.name: chain.arguments(stage).seed for stage in chain.stages if stage.upcycle is None}
    if len(set(seeds.values())) > 1:
        said = ", ".join(f"{name} {seed}" for name, seed in seeds.items())
        raise ValueError(
            f"The stages of {chain.origin} have seeds of their own ({said}), but control_seeds trains all stages with "
            "one seed, and again with the next. Leave seed out of the stages, or control_seeds."
        )


def gives_experts(stage: Stage) -> bool:
    """Whether a stage makes a sparse model of a dense one."""
    return stage.upcycle is not None and not stage.upcycle.get("dense")


def last_training(chain: Chain) -> Stage | None:
    """The last stage that trains."""
    return next((stage for stage in reversed(chain.stages) if stage.upcycle is None), None)


def check_can_compare(chain: Chain, known: list[Known]) -> None:
    """Refuses a recipe that there is no control for.

    Raises:
        ValueError: saying why.
    """
    last = last_training(chain)
    if last is None:
        raise ValueError(f"{chain.origin} trains nothing, so there is nothing to control; leave the control out.")
    if not is_sparse(known[-1].config):
        raise ValueError(
            f"{chain.origin} ends with a dense model, so there is no dense control for it; leave the control out, or "
            "add a stage with `upcycle:`."
        )
    if is_in_place(known[-1].config):
        raise ValueError(
            f"{chain.origin} tunes a VLM that is sparse in its own class; its dense one is no vlmoe model, and vlmoe "
            "finetune does not train it. Leave the control out, and train that one with transformers."
        )
    if load_datasets(chain.arguments(last))[1] is None:
        raise ValueError(
            f"Stage {last.name} of {chain.origin} has nothing to evaluate on, so a control would have nothing to be "
            "compared by; give eval_data or eval_split."
        )


def with_changes(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings for the control, without those that only the sparse model's method hears."""
    method = changes.get("method") or settings.get("method") or METHODS[0]
    return {name: value for name, value in settings.items() if is_heard(name, method)} | changes


def trained_stages(
    chain: Chain, first: int, known: list[Known], start: Known, offset: int
) -> tuple[list[Stage], dict[int, int], dict[str, dict[str, Any]]]:
    """The control's stages that train, from one of the sparse chain's on.

    Args:
        chain: the sparse one.
        first: the number of the first stage that the control has too.
        known: the sparse model behind each stage.
        start: the dense model.
        offset: the number of stages that the control has before them.

    Returns:
        The stages, without a folder; which stage each stands for; and what differs.
    """
    made: list[Stage] = []
    shared, differs = {}, {}
    for stage in chain.stages[first - 1 :]:
        if stage.upcycle is not None:
            continue
        where = f"Stage {stage.name} of {chain.origin}"
        counterparts = Counterparts(known[stage.number - 1].config, start.config)
        changes = dense_settings(stage.settings, counterparts, where, stage.control) | stage.control
        number = offset + len(made) + 1
        made.append(replace(stage, number=number, settings=with_changes(stage.settings, changes), control={}))
        shared[number], differs[stage.name] = stage.number, changes
    return made, shared, differs


def build_pair(sparse: Chain, folder: Path, control: ControlSettings, seed: int, known: list[Known]) -> Pair:
    """Both chains under a seed.

    Args:
        sparse: the recipe's, under that seed.
        folder: the control's.
        control: how it is compared.
        seed: theirs.
        known: the sparse model behind each stage.

    Raises:
        ValueError: if there is no dense model to begin with, or a stage has no counterpart.
    """
    branch = next((stage for stage in sparse.stages if gives_experts(stage)), None)
    values: dict[str, Any] | None = None
    if branch is None:
        model, revision = str(sparse.model_of(sparse.stages[0])), sparse.start.get("model_revision")
        start, values = find_start(model, revision, control)
        first = 1
    elif branch.number == 1:
        assert branch.upcycle is not None
        kept = {name: value for name, value in branch.upcycle.items() if name in OF_TOWERS}
        start, values, first = sparse.start, {"upcycle": {"dense": True} | kept}, 2
    else:
        start, first = {"model": sparse.model_of(branch)}, branch.number + 1
    name = branch.name if branch is not None and branch.number == 1 else MADE_DENSE
    head = [] if values is None else [Stage(1, name, values["upcycle"], {}, {}, folder, True)]
    dense = Chain(
        f"the control of {sparse.origin}", folder, start, tuple(head), sparse.force, sparse.values, sparse.reads, 1
    )
    if branch is not None and branch.number > 1:
        before = known[branch.number - 2]
    elif head:
        before = check_chain(dense)[-1]
    else:
        before = known_of_model(str(start["model"]), sparse.arguments(sparse.stages[0]))
    stages, shared, differs = trained_stages(sparse, first, known, before, len(head))
    placed = tuple(replace(stage, output_dir=folder) for stage in (*head, *stages))
    dense = replace(dense, stages=placed)
    for stage in placed[len(head) :]:
        check_trained_parts(dense, stage, before)
    return Pair(seed, replace(sparse, seen_from=first), dense, shared, differs)


def build_pairs(chain: Chain, control: ControlSettings) -> list[Pair]:
    """The chains of a recipe with a control, under every seed; the first sparse one is the recipe's own.

    Raises:
        ValueError: if there is no control for it.
    """
    last = last_training(chain)
    own_seed = chain.arguments(last).seed if last is not None else 0
    known = check_chain(chain, len(chain.stages))
    check_can_compare(chain, known)
    seeds = control.seeds(own_seed)
    is_as_told = seeds == [own_seed]
    if not is_as_told:
        check_one_seed(chain)
    pairs = []
    for index, seed in enumerate(seeds):
        beside = chain.output_dir / FOLDER
        place = beside / f"{SPARSE}-{seed}" if index else chain.output_dir
        sparse = chain if is_as_told else with_seed(chain, seed, own_seed, place)
        pairs.append(build_pair(sparse, beside / f"{DENSE}-{seed}", control, seed, known))
    return pairs
