"""What goes wrong slowly is said once, with its figures: in the log, in the history, at the end and in a file."""

import json
import logging

import pytest
import torch

from modeling_vlmoe.finetune import build_trainer, finetune, load_chat_data
from modeling_vlmoe.finetune.routing_alarms import DEAD, IDENTICAL, SATURATED
from modeling_vlmoe.finetune.watch.account import (
    ALARM,
    ALARMS_NAME,
    NO_MEMORY,
    STALLED,
    Account,
    Notice,
    TrainingFailed,
    told_in,
)
from modeling_vlmoe.finetune.watch.loss_trend import Facts, Trend, find_trend, reason

FACTS = {
    "steps": 200,
    "rate": 1e-4,
    "num_trained": 10,
    "num_moving": 10,
    "num_targets": 50.0,
    "moved": 1e-2,
    "is_rounded": False,
}


@pytest.fixture
def said(caplog):
    def words(begin):
        return [one.getMessage() for one in caplog.records if one.getMessage().startswith(begin)]

    with caplog.at_level(logging.WARNING):
        yield words


def trained(arguments, model, processor, pictures, **given):
    settings = {"max_steps": 24, "watch_steps": 20, "per_device_train_batch_size": 4, "save_strategy": "no"}
    trainer = build_trainer(model, processor, load_chat_data(pictures, "train"), arguments(**settings | given))
    trainer.train()
    return trainer


def written(tmp_path):
    return json.loads((tmp_path / "out" / ALARMS_NAME).read_text())["alarms"]


@torch.no_grad()
def copy_experts(model):
    for layer in model.model.language_model.layers:
        for parameter in layer.mlp.experts.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))


def test_a_learning_rate_of_zero_is_told_with_copies_that_stay_copies(
    arguments, model, processor, pictures, tmp_path, said
):
    """Both in the log once, in the history and in the file."""
    copy_experts(model)
    trainer = trained(arguments, model, processor, pictures, learning_rate=0.0, logging_steps=4)
    (words,) = said("Loss not falling")
    assert words.startswith("Loss not falling: after 20 steps the median of the last 5 is ")
    assert words.endswith("The learning rate is 0: raise learning_rate, and check lr_scheduler_type and warmup_steps.")
    assert len(said("Experts still identical")) == 3
    entries = [entry for entry in trainer.state.log_history if ALARM in entry]
    assert [entry[ALARM] for entry in entries].count(STALLED) == 1
    assert {entry[ALARM] for entry in entries} == {STALLED, IDENTICAL}
    assert [(one["kind"], one["words"]) for one in written(tmp_path)] == [
        (entry[ALARM], entry["words"]) for entry in entries
    ]
    stalled = next(one for one in written(tmp_path) if one["kind"] == STALLED)
    assert stalled["step"] == 20
    assert stalled["figures"]["moved"] == stalled["figures"]["learning_rate"] == 0
    assert "after 20 steps" in next(one for one in written(tmp_path) if one["kind"] == IDENTICAL)["words"]


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_small_is_told(arguments, model, processor, pictures, said):
    trained(arguments, model, processor, pictures, learning_rate=1e-9)
    (words,) = said("Loss not falling")
    assert "The learning rate is small: in 20 steps the trained weights moved by " in words
    assert "Raise learning_rate." in words


@pytest.mark.slow
def test_what_gets_no_gradient_is_told(arguments, model, processor, pictures, said):
    """Nothing in the ViT behind the layer that the connector reads can learn."""
    model.requires_grad_(False)
    trainer = build_trainer(
        model,
        processor,
        load_chat_data(pictures, "train"),
        arguments(max_steps=20, watch_steps=20, save_strategy="no"),
    )
    trainer.model.requires_grad_(False)
    model.model.vision_tower.head.requires_grad_(True)
    # Something has to be in the loss' graph.
    model.model.language_model.norm.weight.requires_grad_(True).register_hook(torch.zeros_like)
    trainer.train()
    (words,) = said("Loss not falling")
    assert "trained tensors got a gradient" in words


@pytest.mark.slow
def test_a_loss_that_falls_is_not_told_of(arguments, model, processor, pictures, tmp_path, said):
    trained(arguments, model, processor, pictures, logging_steps=10)
    assert said("Loss not falling") == []
    assert not (tmp_path / "out" / ALARMS_NAME).exists()


@pytest.mark.slow
def test_dead_experts_and_saturated_routers_are_in_the_account(arguments, model, processor, pictures, tmp_path, said):
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.router.weight.mul_(1e3)
    settings = {"train_routers": False, "logging_steps": 8, "learning_rate": 1e-3}
    trainer = trained(arguments, model, processor, pictures, **settings)
    kinds = [one["kind"] for one in written(tmp_path)]
    assert kinds.count(SATURATED) == len(said("Router saturated")) >= 1
    assert kinds.count(DEAD) == len(said("Dead experts"))
    one = next(one for one in written(tmp_path) if one["kind"] == SATURATED)
    assert one["figures"]["part"] == "text"
    assert one["figures"]["layer"] == 0
    assert SATURATED in [entry.get(ALARM) for entry in trainer.state.log_history]


@pytest.mark.slow
def test_they_are_listed_at_the_end_of_the_command(arguments, base, tmp_path):
    lines = []
    finetune(arguments(max_steps=22, watch_steps=20, learning_rate=0.0, save_strategy="no"), say=lines.append)
    assert lines[-1].startswith(f"1 alarm ({ALARMS_NAME}):\n  step 20: Loss not falling")


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_said(arguments, base, pictures, tmp_path):
    given = {"learning_rate": 0.0, "watch_steps": 20, "save_steps": 22}
    finetune(arguments(max_steps=22, **given))
    before = written(tmp_path)
    finetune(arguments(max_steps=23, resume_from_checkpoint="true", **given))
    assert [one["kind"] for one in before] == [STALLED]
    assert written(tmp_path)[:1] == before


def test_running_out_of_memory_is_added_to_what_was_said(tmp_path):
    Account(tmp_path).tell(Notice(DEAD, 3, "Dead experts in layer 1", {}))
    with pytest.raises(TrainingFailed), told_in(tmp_path):
        raise TrainingFailed(Notice(NO_MEMORY, None, "Memory ran out: ..."))
    account = Account.read(tmp_path)
    assert [one.kind for one in account.notices] == [DEAD, NO_MEMORY]
    assert account.listed().splitlines()[0] == f"2 alarms ({ALARMS_NAME}):"


# The rules


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ([5.9 - 0.01 * step for step in range(100)], True),
        ([5.9] * 100, False),
        ([5.9 + 0.01 * step for step in range(100)], False),
        ([5.9 + (0.5 if step % 2 else -0.5) for step in range(100)], False),
        ([5.9] * 99 + [0.1], False),  # one step is no trend
        ([9.0] + [5.9] * 99, False),
        ([0.01] * 100, True),  # there is nothing left to learn
    ],
)
def test_medians_say_whether_a_loss_falls(losses, falls):
    assert find_trend(losses).falls == falls


def test_noise_alone_does_not_hide_that_it_falls():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator) * 0.5
    slope = torch.linspace(5.0, 3.0, 400)
    assert find_trend((slope + noise).tolist()).falls
    assert not find_trend((5.0 + noise).tolist()).falls


def test_few_steps_are_not_judged():
    assert find_trend([5.0] * 19) is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"rate": 0.0}, "The learning rate is 0"),
        ({"num_targets": 0.0}, "all labels are -100"),
        ({"num_moving": 0}, "None of the 10 trained tensors got a gradient"),
        ({"moved": 1e-6}, "The learning rate is small"),
        ({"moved": 0.0, "is_rounded": True}, "train in float32"),
        ({"num_moving": 4}, "6 of 10 trained tensors without a gradient"),
        ({}, "No single reason is seen"),
    ],
)
def test_the_reason_is_what_was_measured(facts, words):
    assert words in reason(Trend(5.0, 5.0, 0.1, 40), Facts(**FACTS | facts))


def test_a_loss_that_rises_asks_for_a_lower_learning_rate():
    assert "lower learning_rate (0.0001)" in reason(Trend(5.0, 9.0, 0.1, 40), Facts(**FACTS))
