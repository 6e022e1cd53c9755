"""What cannot be trained is refused before weights are read and a folder is made: on a model without weights."""

import copy
import warnings
from typing import Any

import torch
from transformers import Trainer

from modeling_vlmoe.conversion.meta_models import build_vlm

from ..adapters import prepare_model
from ..arguments import FinetuneArguments
from .adapted_names import bare_name, cells_by_path
from .cells import parameter_cells
from .groups import check_groups, has_groups


def trained_cells(model: Any, paths: dict[str, str]) -> dict[str, bool]:
    """The cells of which something is trained, and whether any of it decays.

    Args:
        model: as it is trained.
        paths: cells by parameters' names and modules' paths (`cells_by_path`).
    """
    decays = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type] # which reads no Trainer
    found: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cell = paths[bare_name(name)]
            found[cell] = found.get(cell, False) or name in decays
    return found


def check_parts(config: Any, args: FinetuneArguments) -> None:
    """Refuses names of parts that the model does not have or that are not trained.

    Args:
        config: the model's.
        args: the recipe.

    Raises:
        ValueError: naming the word or the part.
    """
    if not args.train and not has_groups(args):
        return
    model: Any = build_vlm(copy.deepcopy(config))
    model.tie_weights()
    paths = cells_by_path(parameter_cells(model))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT (0.21) asks transformers by a deprecated name
        prepared = prepare_model(model, args)
    if has_groups(args):
        check_groups(trained_cells(prepared, paths), args)
