"""Rates of parts in two processes are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.finetune import finetune
from modeling_vlmoe.finetune.arguments import parse_settings

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("two_processes.py")
RECIPE = {
    "method": "full",
    "train": ["moe-layers", "norms", "attention", "vision"],
    "learning_rates": {"experts": 1e-3, "routers": 2e-2, "vision": 0.0},
    "weight_decays": {"experts": 0.1},
    "warmups": {"routers": 2},
    "weight_decay": 0.02,
    "learning_rate": 5e-3,
    "adam_epsilon": 1e-3,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "router_aux_loss_coef": 0.0,  # the balance of a batch is not that of its halves
    "router_z_loss_coef": 0.0,
    "ddp_find_unused_parameters": False,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def rates(folder):
    """The learning rates of every part at every log."""
    history = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if name.startswith("learning_rate")} for entry in history]


@pytest.mark.slow
@pytest.mark.parametrize("split", [{}, {"fsdp_size": 2, "save_only_model": True}], ids=["DDP", "FSDP2"])
def test_two_processes_with_rates_of_parts_are_one(split, base, pictures, tmp_path):
    given = RECIPE | {"model": str(base), "data": str(pictures / "test.jsonl")}
    alone = finetune(parse_settings(given | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4}))
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, json.dumps(given | split | {"output_dir": str(folder)})],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    before, wanted, found = (
        AutoModelForImageTextToText.from_pretrained(one).state_dict() for one in (base, alone, folder)
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)
        if "vision_tower" in name:
            assert torch.equal(found[name], before[name]), name
    assert any(not torch.equal(before[name], value) for name, value in found.items())
    assert rates(folder) == rates(alone)
    assert "learning_rate/routers" in rates(folder)[0]
