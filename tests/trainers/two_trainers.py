"""Run by `torchrun --nproc_per_node 2 two_trainers.py BASE FOLDER MODE...`: Trainers in two processes, against one."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

from tests.trainers import chats, runs

NATIVE = {"fsdp": {"fsdp_size": 2}, "fsdp_ep": {"fsdp_size": 2, "ep_size": 2}}


def assert_close(found, wanted, atol, what):
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def resume(base: str, folder: Path, method: str) -> None:
    """A resumed run is the uninterrupted one, and both processes hold one model."""
    first = runs.build_trainer(base, runs.build_model(base, method), folder, max_steps=4, save_steps=2)
    first.train()
    second = runs.build_trainer(base, runs.build_model(base, method), folder, max_steps=4, save_steps=2)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert first.accelerator.num_processes == 2
    for found, wanted in zip(runs.losses(second), runs.losses(first), strict=True):
        assert abs(found - wanted) <= 1e-6, (found, wanted)
    wanted = runs.weights(first)
    for name, value in runs.weights(second).items():
        assert_close(value, wanted[name], 1e-6, name)
        theirs = value.clone()
        dist.broadcast(theirs, src=0)
        assert_close(value, theirs, 0.0, name)


# Each step gives one process a text-only row and the other one with images.
ROWS = [([], "nothing"), (["red"], "red"), (["red", "blue"], "two"), ([], "none")]
STEPS = {"max_steps": 2, "save_steps": 2, "train_sampling_strategy": "sequential", "optim": "sgd"}


def mixed(base: str, folder: Path, method: str) -> None:
    """Rows with and without images side by side, under DDP."""
    model = runs.build_model(base, method)
    trainer = runs.build_trainer(base, model, folder, ROWS, gradient_accumulation_steps=1, **STEPS)
    has_images = ["pixel_values" in batch for batch in trainer.get_train_dataloader()]
    assert has_images == [dist.get_rank() == 1, dist.get_rank() == 0]
    trainer.train()


def native(base: str, folder: Path, mode: str) -> None:
    """The same rows under FSDP2, with expert parallelism too: the model alone is saved, and one process loads it."""
    model = runs.build_model(base, distributed_config=DistributedConfig(**NATIVE[mode]))
    fields = {"gradient_accumulation_steps": 1, "save_only_model": True}
    trainer = runs.build_trainer(base, model, folder, ROWS, **(STEPS | fields))
    trainer.train()
    layers = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
    assert all(type(layer).__name__.startswith("FSDP") for layer in layers)
    batch = trainer.data_collator(chats.chat_rows(ROWS[dist.get_rank() :][:1]))  # text alone in one of the processes
    with torch.no_grad():
        logits = whole(trainer.model.eval()(**batch).logits)
    alone = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-2").eval()
    assert alone.model.language_model.layers[0].mlp.experts.num_experts == 4
    with torch.no_grad():
        assert_close(logits, alone(**batch).logits, 1e-5, mode)


MODES = {
    **{f"resume-{method}": (resume, method) for method in runs.METHODS},
    **{f"mixed-{method}": (mixed, method) for method in runs.METHODS},
    **{mode: (native, mode) for mode in NATIVE},
}


def main(base: str, folder: str, *modes: str) -> None:
    torch.set_num_threads(1)
    for mode in modes:
        run, argument = MODES[mode]
        out = Path(folder) / mode
        out.mkdir(exist_ok=True)
        run(base, out, argument)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{mode} is right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(*sys.argv[1:])
