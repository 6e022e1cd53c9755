"""The cells of two gloo processes, measured by `two_processes.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .run import Cell, base

SCRIPT = Path(__file__).with_name("two_processes.py")
SPREADS = {"ddp": "two processes, DDP", "fsdp": "two processes, FSDP2"}


def measure_spread(spread: str, *options: str, folder: str | None = None) -> dict[str, Cell]:
    """Each trainer's cell, both losses on, with accumulation.

    Args:
        spread: of `SPREADS`.
        *options: names of trainers, all where there are none; `--broken` first makes a mistake; `--host` says that the
            folder's is a host's VLM, sparse in place, with its processor.
        folder: of the model; the tiny model's where None.
    """
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPT)]
    done = subprocess.run(
        [*command, spread, folder or base().name, *options],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    cells = {}
    for line in done.stdout.splitlines():
        if line.startswith("CELL "):
            values = json.loads(line.removeprefix("CELL "))
            name = values.pop("trainer")
            cells[name] = Cell(**values)
    return cells
