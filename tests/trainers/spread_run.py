"""Run by a launcher of several processes: `spread_run.py WAY RECIPE KEY=VALUE...`, `vlmoe finetune` with a look at how
the model is spread before it trains. Behind `--then` comes another such run in the same processes.
"""

import os
import sys
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def check_fsdp(trainer, is_adapted, ep):
    """Layers are wrapped one by one; what is trained is split, or of an adapted model what is frozen."""
    from modeling_vlmoe.finetune.router_load import find_body

    body = find_body(trainer.model)
    layers = [*body.language_model.layers, *body.vision_tower.encoder.layers]
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    for name, one in trainer.model.named_parameters():
        split = isinstance(one, DTensor)
        assert split != (is_adapted and one.requires_grad), name
        assert not split or ep or one.to_local().shape[0] <= -(-one.shape[0] // 2), name
    if not is_adapted:
        experts = body.language_model.layers[0].mlp.experts
        assert experts.num_experts == 4 // ep
        assert isinstance(experts.down_proj, DTensor)
        local = experts.down_proj.to_local()
        assert tuple(local.shape) == (2, 32, 48), local.shape


def check_zero3(trainer):
    from modeling_vlmoe.sparse_moe import SparseMoE

    blocks = [one for one in trainer.model.modules() if isinstance(one, SparseMoE)]
    assert blocks
    assert all(one._z3_leaf for one in blocks)
    base = [one for one in trainer.model.parameters() if hasattr(one, "ds_tensor") and one.ds_numel > 2]
    assert base
    assert all(one.ds_tensor.numel() < one.ds_numel for one in base)


def check_ddp(trainer):
    assert trainer.accelerator.num_processes == 2
    assert trainer.args.ddp_find_unused_parameters


def main(way: str, recipe: str, words: list[str]) -> None:
    from modeling_vlmoe.finetune import finetune, parse_recipe

    torch.set_num_threads(1)
    args = parse_recipe(recipe, words)
    checks = {
        "ddp": check_ddp,
        "fsdp2": partial(check_fsdp, is_adapted=args.method == "lora", ep=args.ep_size or 1),
        "fsdp_ep": partial(check_fsdp, is_adapted=False, ep=args.ep_size or 1),
        "zero3": check_zero3,
    }
    finetune(args, adjust=[checks[way]])
    if args.process_index == 0:
        print(f"{way} is spread as it should be", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    arguments = sys.argv[1:]
    while arguments:
        end = arguments.index("--then") if "--then" in arguments else len(arguments)
        main(arguments[0], arguments[1], arguments[2:end])
        arguments = arguments[end + 1 :]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
