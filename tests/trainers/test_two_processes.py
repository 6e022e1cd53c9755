"""The Trainer in two gloo processes: DDP, FSDP2 and expert parallelism, with batches with and without images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.trainers import runs
from tests.trainers.two_trainers import MODES, NATIVE, ROWS, STEPS

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("two_trainers.py")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Every mode, one after the other in one pair of processes; what they printed, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, str(base), str(folder), *MODES],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return done, folder


def check(finished, mode):
    done, folder = finished
    assert f"{mode} is right" in done.stdout, done.stderr[-4000:]
    return folder / mode


@pytest.mark.parametrize("method", runs.METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(finished, method):
    """Losses and weights to 1e-6, and the same model in both processes."""
    check(finished, f"resume-{method}")


def alone(base, folder, method="full"):
    """The weights after the same micro-batches in one process, which accumulates them."""
    trainer = runs.build_trainer(base, runs.build_model(base, method), folder, ROWS, **STEPS)
    trainer.train()
    return AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-2").state_dict()


@pytest.mark.parametrize("mode", [*(f"mixed-{method}" for method in runs.METHODS), *NATIVE])
def test_rows_with_and_without_images_side_by_side_give_one_process_weights(finished, base, tmp_path, mode):
    """Under DDP, FSDP2 and expert parallelism; the balance loss is per micro-batch, so these are kept alike."""
    folder = check(finished, mode)
    wanted = alone(base, tmp_path, "lora" if mode == "mixed-lora" else "full")
    found = AutoModelForImageTextToText.from_pretrained(folder / "checkpoint-2").state_dict()
    before = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    unlike = [name for name, value in before.items() if name in found and not torch.equal(found[name], value)]
    assert mode == "mixed-lora" or len(unlike) > 50
