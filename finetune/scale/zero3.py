"""DeepSpeed's ZeRO-3 gathers weights module by module, in the order of the first pass. Experts are one module to it:
whichever tokens a process has, it gathers the whole sparse block.
"""

import os
from typing import Any

import torch
from transformers import Trainer

from modeling_vlmoe.sparse_moe import SparseMoE

LEAVES = "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"


def is_zero3(trainer: Trainer) -> bool:
    """Whether a trainer's weights are split by DeepSpeed."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def set_leaves(trainer: Trainer) -> list[type]:
    """Makes each sparse block a leaf module of ZeRO-3, where that splits the weights.

    A configuration of accelerate's may name the class too, which accelerate refuses for a model that has none.

    Returns:
        The classes; empty where nothing is split, or the model is dense.
    """
    if not is_zero3(trainer):
        return []
    model: Any = trainer.model
    # Read under ZeRO-3, a model notes renamings that it did not need, and would write its weights under other names
    # (transformers 5.23).
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    base._weight_conversions = []
    classes = sorted({type(one) for one in model.modules() if isinstance(one, SparseMoE)}, key=str)
    if not classes:
        trainer.accelerator.state.deepspeed_plugin.transformer_moe_cls_names = None
        os.environ.pop(LEAVES, None)
        return []
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, classes)
    for one in model.modules():
        if isinstance(one, SparseMoE):
            one.register_forward_pre_hook(_with_gradient)
    return classes


def _with_gradient(block: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The block's input, such that it gets a gradient: DeepSpeed (0.19) takes up a leaf module's gradients when that
    of its input is there, and where there is none (a connector behind a frozen ViT), before they are made.
    """
    is_learning = torch.is_grad_enabled() and any(one.requires_grad for one in block.parameters())
    if not args or not is_learning or args[0].requires_grad:
        return None
    return args[0].detach().requires_grad_(), *args[1:]
