"""Run by `torchrun --nproc_per_node 2 two_processes_bias.py FOLDER MODE ...`.

Each process trains on a batch of its own; the biases of experts are those of one process that trains on both.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.routers import Router
from tests.models import batch

LOAD = VLMoEForConditionalGeneration.from_pretrained


def biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: module.expert_bias for name, module in model.named_modules() if isinstance(module, Router)}
    return {name.removeprefix("module."): bias.clone() for name, bias in found.items()}


def backward(model: torch.nn.Module, inputs: dict) -> None:
    model(**inputs, labels=inputs["input_ids"]).loss.backward()


def check(mode: str, folder: str) -> None:
    batches, rank = [batch((1, 2)), batch((0, 0), num_text=13)], dist.get_rank()  # one of them has no images
    if mode == "ddp":
        model = DistributedDataParallel(LOAD(folder).train(), find_unused_parameters=True)
    else:
        model = LOAD(folder, distributed_config=DistributedConfig(fsdp_size=2)).train()
        assert any(type(module).__name__.startswith("FSDP") for module in model.modules())
    alone = LOAD(folder).train()
    for step in range(3):
        backward(model, batches[rank])
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        for inputs in batches:
            backward(alone, inputs)
        for module in alone.modules():  # by hand: the hook would sum up over processes
            if isinstance(module, Router):
                load = module.load.sum(0)
                module.expert_bias += module.moe.expert_bias_update_rate * (load.mean() - load).sign()
                module.load = None
        for name, bias in biases(alone).items():
            assert torch.equal(biases(model)[name], bias), (mode, step, name)
        assert step or all(bias.any() for bias in biases(alone).values())  # a later step may undo it
    if rank == 0:
        print(f"{mode} has the biases of one process")


def main(folder: str, *modes: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in modes:
        check(mode, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(*sys.argv[1:])
