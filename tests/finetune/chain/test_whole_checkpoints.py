"""A checkpoint counts once all of it is written, and no longer when something of it is gone."""

import pytest
from transformers import TrainerState

from modeling_vlmoe.finetune.chain.whole_checkpoints import FILES_NAME, is_whole, last_whole_checkpoint, mark_whole


@pytest.fixture
def run(tmp_path):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "scheduler.pt").write_bytes(b"state")
        mark_whole(folder)
    return tmp_path


def test_the_last_by_number_is_taken(run):
    assert last_whole_checkpoint(run) == run / "checkpoint-10"
    (run / "checkpoint-11").mkdir()
    (run / "checkpoint-x").mkdir()
    assert last_whole_checkpoint(run) == run / "checkpoint-10"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "scheduler.pt").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"weig"),
        lambda folder: (folder / FILES_NAME).unlink(),
        lambda folder: (folder / FILES_NAME).write_text("{"),
    ],
)
def test_one_that_is_not_whole_is_passed_over(run, damage):
    damage(run / "checkpoint-10")
    assert last_whole_checkpoint(run) == run / "checkpoint-2"


@pytest.mark.parametrize(("epoch", "last"), [(1.5, 2), (2.0, 10)])
def test_one_at_its_end_in_the_middle_of_an_epoch_is_passed_over(run, epoch, last):
    """The host would take another step from there."""
    TrainerState(global_step=10, max_steps=10, epoch=epoch).save_to_json(str(run / "checkpoint-10/trainer_state.json"))
    mark_whole(run / "checkpoint-10")
    assert last_whole_checkpoint(run) == run / f"checkpoint-{last}"


def test_files_that_were_added_do_not_matter(run):
    (run / "checkpoint-10" / "notes.txt").write_text("mine")
    assert is_whole(run / "checkpoint-10")


def test_weights_alone_are_nothing_to_go_on_from(run):
    """`save_only_model`: a run would begin its optimizer and its data anew."""
    (run / "checkpoint-10" / "scheduler.pt").unlink()
    mark_whole(run / "checkpoint-10")
    assert last_whole_checkpoint(run) == run / "checkpoint-2"
    assert last_whole_checkpoint(run / "checkpoint-2") is None
