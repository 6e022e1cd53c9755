"""Run by `torchrun --nproc_per_node 2 two_processes_any_size.py FOLDER...`.

FSDP2 around ViTs that take images of any size: one process has a batch with images, the other text alone.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoProcessor
from transformers.distributed import DistributedConfig

from modeling_vlmoe import VLMoEForConditionalGeneration
from tests.models import gap
from tests.variable_images import pictures


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(folder: str) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    split = VLMoEForConditionalGeneration.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    alone = VLMoEForConditionalGeneration.from_pretrained(folder)
    batches = [
        processor(text=["a<image>b<image>c"], images=[pictures()[:2]], return_tensors="pt"),
        processor(text=["no picture at all"], return_tensors="pt"),
    ]
    batch = batches[dist.get_rank()]
    found = split(**batch, labels=batch["input_ids"])
    assert gap(whole(found.logits), alone(**batch).logits) <= 1e-5
    found.loss.backward()
    for one in batches:
        (alone(**one, labels=one["input_ids"]).loss / 2).backward()
    for name, parameter in split.named_parameters():
        wanted = alone.get_parameter(name).grad
        if parameter.grad is None:
            assert wanted is None or not wanted.any(), name
            continue
        wanted = torch.zeros_like(whole(parameter.grad)) if wanted is None else wanted
        torch.testing.assert_close(
            whole(parameter.grad), wanted, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def main(*folders: str) -> None:
    torch.set_num_threads(1)
    for folder in folders:
        check(folder)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{Path(folder).name} is right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(*sys.argv[1:])
