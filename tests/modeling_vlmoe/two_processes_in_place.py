"""Run by `torchrun --nproc_per_node 2 two_processes_in_place.py FAMILY FOLDER NEW_FOLDER MODE ...`.

A host's VLM that is sparse in place, split, against the whole one in each process: forward, backward, a step, saving.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from modeling_vlmoe.parts import find_towers
from modeling_vlmoe.towers import tower_layers
from tests import hosts
from tests.modeling_vlmoe.two_processes import SIZES, whole
from tests.models import gap


def load(folder, mode=None):
    sizes = {} if mode is None else {"distributed_config": DistributedConfig(**SIZES[mode])}
    return AutoModelForImageTextToText.from_pretrained(folder, **sizes)


def check(mode, family, folder, new_folder):
    split, alone = load(folder, mode).train(), load(folder).train()
    if mode.startswith("fsdp"):
        layers = [layer for _, tower in find_towers(split).values() for layer in tower_layers(tower)[1]]
        assert all(type(layer).__name__.startswith("FSDP") for layer in layers)
    experts = tower_layers(find_towers(split)["text"][1])[1][0].mlp.experts
    assert experts.num_experts == (2 if mode.endswith("ep") else 4)
    inputs = hosts.inputs(hosts.processor(family), family, (1, 2))
    inputs["labels"] = inputs["input_ids"]
    for step in range(2):
        found, wanted = split(**inputs), alone(**inputs)
        assert gap(whole(found.logits), wanted.logits) <= (1e-5 if step == 0 else 1e-4)
        assert abs(found.loss - wanted.loss) <= 1e-5
        torch.testing.assert_close(found.aux_loss, wanted.aux_loss, atol=1e-5, rtol=1e-4)
        found.loss.backward()
        wanted.loss.backward()
        for name, parameter in split.named_parameters():
            other = alone.get_parameter(name).grad
            assert (parameter.grad is None) == (other is None), name
            if other is not None:
                torch.testing.assert_close(
                    whole(parameter.grad), other, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
                )
        for one in (split, alone):
            torch.optim.SGD(one.parameters(), lr=0.01).step()
            one.zero_grad()
    split.eval().save_pretrained(new_folder)
    dist.barrier()
    with torch.no_grad():
        assert gap(load(new_folder).eval()(**inputs).logits, whole(split(**inputs).logits)) <= 1e-5
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{mode} equals one process")


def main(family, folder, new_folder, *modes):
    torch.set_num_threads(1)
    for mode in modes:
        check(mode, family, folder, f"{new_folder}/{mode}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
