"""A word to those who wrap a sparse model with PEFT by themselves, where PEFT (0.21) fails nothing and helps nobody.

Idle experts: `target_modules="all-linear"` finds Linears. Experts are stacks of weights and routers hold a bare
weight, so neither is found, and what is most of the model is never trained.

Adapted twice: the end of a name such as "mlp.experts.down_proj" in `target_parameters` finds every tower's experts and
the connector's. With `modules_to_save=["connector"]` these are in both, and the saved adapter cannot be loaded.

PEFT gives a model no say when it is wrapped; the first training pass is where the model sees it.
"""

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .delta_experts import delta_experts
from .parts import find_towers
from .parts_config import num_feature_layers
from .towers import sparse_blocks, tower_layers

logger = logging.getLogger(__name__)

HELPER = "modeling_vlmoe.finetune.lora_config(model)"


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT has put the module in."""
    return type(module).__module__.startswith("peft.")


def expert_suffixes(model: nn.Module) -> list[str]:
    """How the stacks of expert weights end, as PEFT's `target_parameters` takes them: "mlp.experts.down_proj"."""
    ends = {
        f"{path.rpartition('.')[2]}.experts.{name}"
        for path, block in sparse_blocks(model)
        if not hasattr(block.experts, "deltas")
        for name in block.experts.stacks
    }
    return sorted(ends)


def remedy(model: nn.Module) -> str:
    """How an adapter reaches experts and routers."""
    if any(is_parametrized(block.experts) for _, block in sparse_blocks(model)):
        return f"Let {HELPER} name what can learn: PEFT finds packed experts by their full names alone."
    suffixes = expert_suffixes(model)
    whole = ["router", *(["deltas"] if delta_experts(model) else [])]
    stacks = f"target_parameters={suffixes} and " if suffixes else ""
    return f"Give LoraConfig {stacks}modules_to_save={whole}, or let {HELPER} name exactly what can learn."


def count_unread(model: Any) -> int:
    """Trained weights of the ViT behind the layer that the connector reads, which never get a gradient."""
    if (vision := find_towers(model).get("vision")) is None:
        return 0
    path, _ = tower_layers(vision[1])
    num_read = num_feature_layers(model.config)
    unread, is_past, is_behind = 0, False, False
    for name, parameter in vision[1].named_parameters():  # in the order of use: embeddings, layers, head
        if name.startswith(f"{path}."):
            is_past = True
            is_behind = int(name.removeprefix(f"{path}.").partition(".")[0]) >= num_read
        else:
            is_behind = is_past
        unread += parameter.numel() if is_behind and parameter.requires_grad else 0
    return unread


def warn_of_idle_experts(model: Any) -> None:
    """Says so where neither experts nor routers are trained."""
    blocks = [block for _, block in sparse_blocks(model)]
    if not blocks or any(parameter.requires_grad for block in blocks for parameter in block.parameters()):
        return
    unread = count_unread(model)
    logger.warning(
        "This model is sparse, but the adapter around it trains neither its experts nor its routers, and the router "
        "losses have no effect: PEFT's all-linear finds Linears only. %s%s If it is meant, set "
        "`warns_of_adapters = False` on the VLMoEModel.",
        remedy(model),
        f" {unread} of its weights adapt what the connector never reads of the ViT, and get no gradient either: "
        "exclude_modules=r'.*vision_tower.*' keeps them out."
        if unread
        else "",
    )


def warn_of_adapted_twice(model: Any) -> None:
    """Says so where a module that is trained whole holds an adapter."""
    twice = [
        path
        for path, module in model.named_modules()
        if type(module).__name__ == "ModulesToSaveWrapper" and any(map(is_adapter, list(module.modules())[1:]))
    ]
    if twice:
        logger.warning(
            "The adapter around this model trains %s whole and adapts it too; PEFT will save it, but not load it. A "
            "name in target_parameters such as 'mlp.experts.down_proj' means the experts of every tower and the "
            "connector's: take %s out of modules_to_save, or let %s name the parameters in full.",
            ", ".join(twice),
            "it" if len(twice) == 1 else "them",
            HELPER,
        )


def warn_of_adapters(model: Any) -> None:
    """Says once per model what is wrong with the adapter around it.

    Args:
        model: a `VLMoEModel` in training; its `warns_of_adapters` is switched off here.
    """
    if torch.compiler.is_compiling() or not model.warns_of_adapters:
        return
    model.warns_of_adapters = False
    if any(map(is_adapter, model.modules())):
        warn_of_idle_experts(model)
        warn_of_adapted_twice(model)
