"""What can be known of a chain before its first stage runs: models, data, and what each stage would train.

Configurations go along the chain in the place of checkpoints: an upcycling makes another one, on which the next stages
are tried without weights.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._subclasses import FakeTensorMode

from modeling_vlmoe import VLMoEForConditionalGeneration, register
from modeling_vlmoe.conversion.meta_models import build_on_meta
from modeling_vlmoe.conversion.planning import asked_experts, build_config, fit_layers, plan_upcycle
from modeling_vlmoe.conversion.plans import choose_drawing
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.moe_config import PARTS

from ..arguments import FinetuneArguments
from ..checkpoints import check_base, load_base_config, load_processor
from ..hollow_models import build_hollow
from ..train import check_datasets, load_datasets
from .emptied import check_images_stay
from .stages import Chain, Stage

# What of a stage's arguments decides which rows it reads and how long they may be.
OF_DATA = ("data", "train_split", "eval_data", "eval_split", "max_length")


@dataclass(frozen=True)
class Known:
    """What is known of the model between two stages.

    Attributes:
        config: its configuration.
        processor: its processor.
    """

    config: Any
    processor: Any


def is_sparse(config: Any) -> bool:
    """Whether a part has experts."""
    return any(config.moe(part) is not None for part in PARTS)


def known_of_model(model: str, args: FinetuneArguments) -> Known:
    """A model that is there.

    Raises:
        ValueError: if it is none, or none of ours.
    """
    config = load_base_config(model, **args.hub)
    check_base(config, model)
    return Known(config, load_processor(model, config, **args.hub))


def check_parents(chain: Chain, stage: Stage) -> Known:
    """The model that a first conversion would make.

    Raises:
        ValueError: as `vlmoe upcycle` would.
    """
    plan = plan_upcycle(chain.upcycling(stage))
    return Known(plan.config, plan.processor)


def check_upcycling(chain: Chain, stage: Stage, before: Known) -> Known:
    """The model that a later conversion would make.

    Raises:
        ValueError: for experts that the dense model has no place for, and for a model that is sparse already.
    """
    args, where = chain.upcycling(stage), f"Stage {stage.name} of {chain.origin}"
    if is_sparse(before.config) or is_in_place(before.config):
        raise ValueError(f"{where} upcycles a model that has experts already; leave out one of the upcyclings.")
    try:
        choose_drawing(args)
        asked = asked_experts(args)
        fit_layers(args, asked, before.config.text_config.num_hidden_layers)
        config = build_config(before.config, asked, before.processor)
        build_on_meta(lambda: VLMoEForConditionalGeneration(copy.deepcopy(config)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Known(config, before.processor)


def check_trained_parts(chain: Chain, stage: Stage, before: Known) -> None:
    """Tries what a stage would train, without weights and rows.

    Raises:
        ValueError: naming what is wrong.
    """
    args = chain.arguments(stage)
    try:
        build_hollow(before.config, args, FakeTensorMode())
    except ValueError as error:
        raise ValueError(f"Stage {stage.name} of {chain.origin}: {error}") from error


def check_training(chain: Chain, stage: Stage, before: Known, seen: set[str], emptied: Sequence[Path] = ()) -> None:
    """Tries what a stage would train, and goes over its rows where none has before.

    Raises:
        ValueError: naming what is wrong.
    """
    check_trained_parts(chain, stage, before)
    args = chain.arguments(stage)
    try:
        key = repr([getattr(args, name) for name in OF_DATA]) + args.method
        if key not in seen:
            train, test = load_datasets(args)
            check_datasets(args, before.processor, train, test)
            for rows in (train, test):
                check_images_stay(rows, emptied)
            seen.add(key)
    except ValueError as error:
        raise ValueError(f"Stage {stage.name} of {chain.origin}: {error}") from error


def first_known(chain: Chain) -> Known | None:
    """The model that a chain begins with; None where its first stage makes one."""
    first = chain.stages[0]
    model = chain.model_of(first)
    if first.upcycle is not None or model is None:
        return None
    return known_of_model(model, chain.arguments(first))


def check_chain(chain: Chain, num_finished: int = 0, emptied: Sequence[Path] = ()) -> list[Known]:
    """Refuses a chain of which a stage could not run.

    Args:
        chain: parsed.
        num_finished: stages that are not run again, whose data need not be there.
        emptied: folders that are emptied before, which may hold no images of the data.

    Returns:
        The model behind each stage.

    Raises:
        ValueError: naming the first such stage and what is wrong in it.
    """
    register()
    known, seen, found = first_known(chain), set[str](), list[Known]()
    for stage in chain.stages:
        if stage.upcycle is None:
            assert known is not None
            if stage.number > num_finished:
                check_training(chain, stage, known, seen, emptied)
        elif known is None:
            known = check_parents(chain, stage)
        else:
            known = check_upcycling(chain, stage, known)
        found.append(known)
    return found
