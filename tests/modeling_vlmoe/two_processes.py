"""Run by `torchrun --nproc_per_node 2 two_processes.py FOLDER NEW_FOLDER MODE ...`.

A split model against the whole one in each process: forward, backward, steps, saving, loading whole and split again.
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from modeling_vlmoe import VLMoEForConditionalGeneration
from tests.models import batch, gap

SIZES = {
    "fsdp": {"fsdp_size": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2},
    "tp": {"tp_size": 2, "tp_plan": "auto"},
    "tp_ep": {"tp_size": 2, "tp_plan": "auto", "ep_size": 2, "ep_implementation": "all_reduce"},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_split(mode: str, folder: str) -> VLMoEForConditionalGeneration:
    sizes = DistributedConfig(**SIZES[mode])  # one per model: the host resolves it in place
    return VLMoEForConditionalGeneration.from_pretrained(folder, distributed_config=sizes)


def check_saved(mode: str, split: VLMoEForConditionalGeneration, folder: str, inputs: dict) -> None:
    """What the processes save is the whole model, for one process and for as many as before."""
    split.eval().save_pretrained(folder)
    dist.barrier()
    with torch.no_grad():
        wanted = whole(split(**inputs).logits)
        alone, info = VLMoEForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert gap(alone.eval()(**inputs).logits, wanted) <= 1e-5
        assert gap(whole(load_split(mode, folder).eval()(**inputs).logits), wanted) <= 1e-5


def check(mode: str, folder: str, new_folder: str) -> None:
    split = load_split(mode, folder).train()
    alone = VLMoEForConditionalGeneration.from_pretrained(folder).train()
    wrapped = [type(module).__name__ for module in split.modules() if type(module).__name__.startswith("FSDP")]
    layers = [*split.model.language_model.layers, *split.model.vision_tower.encoder.layers]
    assert not mode.startswith("fsdp") or all(type(layer).__name__.startswith("FSDP") for layer in layers), wrapped
    experts = split.model.language_model.layers[0].mlp.experts
    assert experts.num_experts == (2 if mode.endswith("ep") else 4)
    if mode == "tp":
        assert experts.down_proj.to_local().shape[-1] == 24, "the experts' width is not split"

    inputs = batch((1, 2))
    inputs["labels"] = inputs["input_ids"]
    for step in range(2):
        found, wanted = split(**inputs), alone(**inputs)
        limit = (
            1e-5 if step == 0 else 1e-4
        )  # a step carries the rounding of two unlike orders of summation into the weights
        assert gap(whole(found.logits), wanted.logits) <= limit, (mode, step, gap(whole(found.logits), wanted.logits))
        assert abs(found.loss - wanted.loss) <= 1e-5
        found.loss.backward()
        wanted.loss.backward()
        for name, parameter in split.named_parameters():
            other = alone.get_parameter(name).grad
            assert (parameter.grad is None) == (other is None), name
            if other is not None:
                torch.testing.assert_close(
                    whole(parameter.grad), other, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
                )
        for model in (split, alone):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
    check_saved(mode, split, new_folder, inputs)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{mode} equals one process: {sorted(set(wrapped))}")


def main(folder: str, new_folder: str, *modes: str) -> None:
    torch.set_num_threads(1)
    for mode in modes:
        check(mode, folder, f"{new_folder}/{mode}")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(*sys.argv[1:])
