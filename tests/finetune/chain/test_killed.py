"""`kill -9` anywhere in a chain: the same command again comes to what an uninterrupted run comes to, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_vlmoe.finetune.chain.run import run_chain
from tests.finetune.chain import chains

ROOT = Path(__file__).parents[3]
# In an order in which each point is reached from where the run that was killed at the one before goes on.
TRAINED = (
    "in_the_record_of_its_begin",
    "in_the_first_step",
    "in_a_checkpoint",
    "before_the_mark",
    "in_the_mark",
    "in_the_removal_of_a_checkpoint",
    "in_a_step",
    "in_the_result",
    "in_the_record_of_its_end",
    "between_the_stages",
)
CONVERTED = (
    "in_the_record_of_its_begin",
    "in_an_upcycling",
    "before_the_proof_is_done",
    "in_the_record_of_its_end",
    "between_the_stages",
)
POINTS = {
    "compose": CONVERTED,
    "align": TRAINED,
    "dense-tune": ("in_the_first_step", "in_a_checkpoint", "in_a_step", "in_the_result", "in_the_merging"),
    "upcycle": CONVERTED,
    "moe-tune": ("in_a_checkpoint", "in_a_step", "in_the_result", "in_the_record_of_its_end"),
}


def killed(point, recipe, words):
    """A run that is killed there; what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.finetune.chain.killed", point, str(recipe), *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    wanted = 0 if point == "nowhere" else -signal.SIGKILL
    assert done.returncode == wanted, (point, done.stdout[-1000:], done.stderr[-3000:])
    return done.stdout


@pytest.mark.slow
def test_a_chain_that_was_killed_in_a_checkpoint_is_the_uninterrupted_one(whole, parents, recipe, data, tmp_path):
    """In a process of its own, and resumed in this one."""
    out = tmp_path / "out"
    words = chains.words(parents, data, out)
    killed("in_a_checkpoint:align", recipe, words)
    assert chains.read(out)["stages"][1]["state"] == "begun"
    said = []
    run_chain(chains.parsed(recipe, words), said.append)
    assert said[0] == f"finished already, by {out / 'chain.json'}: compose"
    assert said[1].endswith(f"training into {out / '2-align'}, from checkpoint-1")
    chains.assert_same(chains.results(out), chains.results(whole[0]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", POINTS)
def test_a_chain_that_was_killed_everywhere_in_a_stage_is_the_uninterrupted_one(
    stage, whole, parents, recipe, data, tmp_path
):
    """At each point in turn, each run going on from the one that was killed before; then to the end."""
    words = chains.words(parents, data, tmp_path / "out")
    for where in POINTS[stage]:
        killed(f"{where}:{stage}", recipe, words)
        assert os.path.exists(tmp_path / "out")
    killed("nowhere", recipe, words)
    chains.assert_same(chains.results(tmp_path / "out"), chains.results(whole[0]))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
