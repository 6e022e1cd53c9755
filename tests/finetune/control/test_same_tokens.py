"""A control is compared with what the model was trained on, or not at all."""

import json
import shutil
from types import SimpleNamespace

import pytest

from modeling_vlmoe.finetune.chain import run as chain_run
from modeling_vlmoe.finetune.control.same_tokens import check_processes, check_same_tokens
from modeling_vlmoe.finetune.control.seen_batches import covers, seen_path
from modeling_vlmoe.finetune.recipe_runs import run_recipe
from tests.finetune.control.controls import ON, given


class Trains(Exception):
    """In the place of a training."""


@pytest.fixture
def trained(monkeypatch):
    """The folders that would have been trained in."""
    found = []

    def train(args, *others):
        found.append(args.folder.name)
        raise Trains

    monkeypatch.setattr(chain_run, "finetune", train)
    return found


@pytest.fixture
def without_record(controlled, tmp_path):
    """The model of a recipe as it is run without a control."""
    shutil.copytree(controlled[0], tmp_path / "out", ignore=shutil.ignore_patterns("control", "seen_batches*"))
    return tmp_path / "out"


@pytest.mark.parametrize("match", ["tokens", "flops"])
def test_raises_before_training_when_the_model_was_run_without_a_control(
    match, without_record, dense, recipe, data, trained
):
    with pytest.raises(
        ValueError, match=r"moe-tune has finished .*run without a control: no seen_batches.jsonl .*force"
    ):
        run_recipe(recipe, given(dense, data, without_record), ON | {"control_match": match})
    assert not trained
    assert not (without_record / "control").exists()


def test_force_trains_a_model_again_that_was_run_without_a_control(without_record, dense, recipe, data, trained):
    with pytest.raises(Trains):
        run_recipe(recipe, given(dense, data, without_record, "force=true"), ON)
    assert trained == ["3-moe-tune"]


def write_seen(folder, *digests, process=0):
    folder.mkdir(exist_ok=True)
    lines = [{"step": step, "digest": digest, "tokens": 1} for step, digest in enumerate(digests)]
    seen_path(folder, process).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def pair(tmp_path):
    """A stage of both, which have seen the same in two processes."""
    stages = []
    for name in ("sparse", "dense"):
        stages.append(SimpleNamespace(number=1, name="tune", folder=tmp_path / name, upcycle=None))
        write_seen(stages[-1].folder, "a", "b")
        write_seen(stages[-1].folder, "c", "d", process=1)
    sparse, dense = (SimpleNamespace(stages=(stage,)) for stage in stages)
    return SimpleNamespace(sparse=sparse, dense=dense, shared={1: 1})


@pytest.mark.parametrize("is_matched", [False, True])
@pytest.mark.parametrize(
    ("digests", "process", "message"),
    [
        (
            [],
            0,
            "Nothing says which batches stage tune saw in .*: it has no seen_batches.jsonl, or an empty one. Give",
        ),
        (["c", "e"], 1, "saw other tokens than the model in stage tune, from step 2 on"),
        (["f"], 2, "trained by 2 processes in stage tune, its control by 3, .*train both by the same number"),
    ],
)
def test_raises_when_the_control_saw_other_batches(digests, process, message, is_matched, pair, tmp_path):
    check_same_tokens(pair, is_matched)
    write_seen(tmp_path / "dense", *digests, process=process)
    with pytest.raises(ValueError, match=message):
        check_same_tokens(pair, is_matched)


@pytest.mark.parametrize("is_matched", [False, True])
def test_raises_when_nothing_says_what_the_model_saw(is_matched, pair, tmp_path):
    shutil.rmtree(tmp_path / "sparse")
    with pytest.raises(ValueError, match=r"Nothing says which batches stage tune saw in .*sparse"):
        check_same_tokens(pair, is_matched)


def test_raises_before_training_when_the_control_has_other_processes(pair, tmp_path):
    shutil.rmtree(tmp_path / "dense")
    with pytest.raises(ValueError, match="trained by 2 processes in stage tune, its control by 1"):
        check_processes(pair)


def test_a_record_that_begins_late_is_not_whole(tmp_path):
    write_seen(tmp_path, "a", "b")
    assert covers(tmp_path, 2)
    assert not covers(tmp_path, 3)
    seen_path(tmp_path).write_text('{"step": 1, "digest": "b", "tokens": 1}\n')
    assert not covers(tmp_path, 2)
    assert not covers(tmp_path / "nowhere", 1)
