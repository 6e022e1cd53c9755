"""A chain in two processes: one of them converts and keeps the record, both train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.finetune.chain import chains

ROOT = Path(__file__).parents[3]
ONE_ROW = "per_device_train_batch_size=1"  # in each process: the rows of a step are those of one process with two


def run(point, recipe, words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    return subprocess.run(
        [*command, "-m", "tests.finetune.chain.killed", point, str(recipe), *words],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )


@pytest.fixture(scope="module")
def both(parents, recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "out"
    done = run("nowhere", recipe, chains.words(parents, data, out, ONE_ROW))
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout


@pytest.mark.slow
def test_two_processes_come_to_what_one_comes_to(both, whole):
    """The connector after its stage; later stages have a balance loss for each process."""
    out, said = both
    assert said.count("stage 1 of 5") == 1
    assert [entry["state"] for entry in chains.read(out)["stages"]] == ["finished"] * 5
    assert not list(out.glob(".*"))
    found, wanted = (load_file(one / "2-align" / "model.safetensors") for one in (out, whole[0]))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["in_an_upcycling:upcycle", "in_a_step:moe-tune", "in_the_result:dense-tune"])
def test_two_processes_that_were_killed_go_on(point, both, parents, recipe, data, tmp_path):
    words = chains.words(parents, data, tmp_path / "out", ONE_ROW)
    assert run(point, recipe, words).returncode != 0
    done = run("nowhere", recipe, words)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "finished already" in done.stdout
    chains.assert_same(chains.results(tmp_path / "out"), chains.results(both[0]))


@pytest.mark.slow
def test_a_refusal_of_one_process_ends_both(both, parents, recipe, data):
    """What is recorded is read by the first process alone."""
    done = run("nowhere", recipe, chains.words(parents, data, both[0], ONE_ROW, "align.learning_rate=1"))
    assert done.returncode != 0
    assert done.stderr.count("ValueError: Stage align has finished in") >= 2, done.stderr[-3000:]
