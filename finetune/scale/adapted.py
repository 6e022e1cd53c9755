"""A model with an adapter, split by FSDP2: the frozen base is, what is trained stays whole in each process.

transformers splits a model while it is read, before there is an adapter; PEFT then copies split modules
(`modules_to_save`) and puts its factors on split experts, which fails (transformers 5.23, peft 0.21). So the base is
split afterwards, layer by layer as transformers' plan says, by torch's own `fully_shard`. What is trained is small:
every process holds it, and gradients are averaged as DDP does.

Invariant: after `split_adapted` every layer of both towers is an `FSDPModule`, and a parameter is a `DTensor` if and
only if it is frozen and of the base's precision.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import Trainer
from transformers.distributed import DistributedConfig

from modeling_vlmoe.parts import find_towers, has_layers
from modeling_vlmoe.towers import tower_layers


def _stays_whole(model: nn.Module) -> set[nn.Parameter]:
    """What is trained, and the few tensors of another precision (routers): FSDP2 gathers groups of one."""
    sizes: Counter[torch.dtype] = Counter()
    for one in model.parameters():
        if not one.requires_grad:
            sizes[one.dtype] += one.numel()
    main = sizes.most_common(1)[0][0] if sizes else None
    return {one for one in model.parameters() if one.requires_grad or one.dtype != main}


def split_adapted(model: PeftModel, args: Any) -> None:
    """Splits the base of an adapted model over all processes.

    Args:
        model: with its adapter, every process the same.
        args: a `FinetuneArguments` whose `fsdp_size` is the number of processes.
    """
    base: Any = model.get_base_model()
    mesh = dist.init_device_mesh(args.device.type, (args.fsdp_size,), mesh_dim_names=("fsdp",))
    whole = _stays_whole(model)
    for _, tower in find_towers(base).values():
        if has_layers(tower):
            for layer in tower_layers(tower)[1]:
                fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)
    for one in whole:
        one.data = one.data.to(args.device)
    # What the host notes of a model that it splits itself: the Trainer then leaves it as it is.
    base._is_distributed_loading_by_transformers = base._is_fsdp_managed_module = True
    base._fsdp_size = args.fsdp_size
    base.config.distributed_config = DistributedConfig(fsdp_size=args.fsdp_size)


def average_gradients(trainer: Trainer) -> None:
    """Has the gradients of what stays whole averaged over processes at the end of each step.

    The Trainer does so by an average that gloo lacks (transformers 5.23); this sum serves every backend.
    """
    model: Any = trainer.model
    for one in model.parameters():
        if one.requires_grad:

            def average(parameter: Any) -> None:
                if trainer.accelerator.sync_gradients:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()

            one.register_post_accumulate_grad_hook(average)
            one._replicated_grad_hook_registered = True
