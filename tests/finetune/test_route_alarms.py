"""Alarms of training: raised in words, once, with their figures; and none where all is well."""

import logging

import pytest
import torch
from transformers import Trainer

from modeling_vlmoe.finetune import (
    AlarmLimits,
    ChatCollator,
    RouterLoadCallback,
    build_trainer,
    load_chat_data,
    log_router_load,
)
from modeling_vlmoe.finetune.expert_similarity import Similarity
from modeling_vlmoe.finetune.router_load import RouterLoad
from modeling_vlmoe.finetune.routing_alarms import (
    DEAD,
    IDENTICAL,
    SATURATED,
    dead_alarm,
    identical_alarm,
    saturated_alarm,
)
from tests import models

EAGER = AlarmLimits(dead_after=2, identical_after=2, saturated_tokens=10)
TEXT_17 = ("text", 17)


@pytest.fixture
def warnings_said(caplog):
    def said():
        return [record.getMessage() for record in caplog.records if record.name.endswith("finetune.callbacks")]

    with caplog.at_level(logging.WARNING):
        yield said


def close_expert(model, layer, expert):
    """Has a router of the LLM never choose one expert."""
    router = model.model.language_model.layers[layer].mlp.router
    is_closed = torch.arange(4) == expert

    def logits(x_TD, context):
        found = type(router).logits(router, x_TD, context)
        return found.masked_fill(is_closed, found.detach().min() - 1)

    router.logits = logits


@torch.no_grad()
def copy_experts(block):
    for parameter in block.experts.parameters():
        parameter.copy_(parameter[:1].clone().expand_as(parameter))


def trained(arguments, model, processor, pictures, limits=EAGER, **given):
    """A run of four steps over all kinds of rows, with alarms that come early."""
    args = arguments(max_steps=4, save_strategy="no", router_alarms=False, log_router_load=False, **given)
    trainer = build_trainer(model, processor, load_chat_data(pictures, "train"), args)
    callback = log_router_load(trainer, limits=limits)
    trainer.train()
    return trainer, callback


def test_a_healthy_run_raises_none(arguments, model, processor, pictures, warnings_said):
    trainer = build_trainer(model, processor, load_chat_data(pictures, "train"), arguments(max_steps=3))
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, RouterLoadCallback))
    assert callback.has_alarms
    trainer.train()
    assert callback.alarms == []
    assert warnings_said() == []


def test_a_dead_expert_is_told_of_once(arguments, model, processor, pictures, warnings_said):
    close_expert(model, 2, 3)
    _, callback = trained(arguments, model, processor, pictures, train_routers=False)
    (alarm,) = [alarm for alarm in callback.alarms if alarm.layer == ("text", 2)]
    assert alarm.kind == DEAD
    (said,) = [words for words in warnings_said() if "layer 2 of the LLM" in words]
    assert said == alarm.words
    assert said.startswith("Dead experts in layer 2 of the LLM: expert 3 of 4 got none of the last ")
    assert "Raise router_aux_loss_coef" in said


def test_experts_that_stay_copies_are_told_of(arguments, model, processor, pictures, warnings_said):
    copy_experts(model.model.language_model.layers[1].mlp)
    trained(arguments, model, processor, pictures, learning_rate=1e-12)
    (said,) = [words for words in warnings_said() if words.startswith("Experts still identical")]
    assert said.startswith("Experts still identical in layer 1 of the LLM after 2 steps: their weights are ")


def test_experts_that_are_not_trained_may_be_copies(arguments, model, processor, pictures, warnings_said):
    for layer in model.model.language_model.layers:
        copy_experts(layer.mlp)
    trained(arguments, model, processor, pictures, lora_targets=["attention"])
    assert not [words for words in warnings_said() if "identical" in words]


def test_experts_that_learn_do_not_stay_copies(arguments, model, processor, pictures, warnings_said):
    for layer in model.model.language_model.layers:
        copy_experts(layer.mlp)
    trainer, _ = trained(arguments, model, processor, pictures)
    assert not [words for words in warnings_said() if "identical" in words]
    distances = [
        entry["router/text/layer_0/expert_distance"] for entry in trainer.state.log_history if "loss" in entry
    ]
    assert distances[-1] > distances[0] > 0


def test_a_saturated_router_is_told_of_by_modality(arguments, model, processor, pictures, warnings_said):
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.router.weight.mul_(1e3)
    _, callback = trained(arguments, model, processor, pictures, train_routers=False)
    found = [alarm for alarm in callback.alarms if alarm.kind == SATURATED]
    assert {(alarm.layer, alarm.modality) for alarm in found} == {(("text", 0), "text"), (("text", 0), "image")}
    assert len([words for words in warnings_said() if words.startswith("Router saturated")]) == 2


def test_scalars_of_each_modality_are_logged(arguments, model, processor, pictures):
    trainer, _ = trained(arguments, model, processor, pictures, limits=None)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for modality in ("text", "image"):
        assert 0.25 <= entry[f"router/text/layer_1/{modality}/top_probability"] <= 1
        assert 0 < entry[f"router/text/layer_1/{modality}/entropy"] <= 1
    assert 0.25 <= entry["router/vision/layer_1/image/top_probability"] <= 1
    assert "router/vision/layer_1/text/top_probability" not in entry
    assert -1 <= entry["router/text/layer_1/expert_similarity"] <= 1
    assert "router/vision/layer_1/expert_similarity" not in entry  # not trained


def test_the_callback_serves_a_plain_trainer(arguments, model, processor, pictures, warnings_said):
    close_expert(model, 0, 1)
    callback = RouterLoadCallback(limits=EAGER)
    trainer = Trainer(
        model=model,
        args=arguments(max_steps=2, save_strategy="no"),
        train_dataset=load_chat_data(pictures, "train"),
        data_collator=ChatCollator(processor),
        callbacks=[callback],
    )
    trainer.train()
    assert ("text", 0) in [alarm.layer for alarm in callback.alarms if alarm.kind == DEAD]
    assert "router/text/layer_0/expert_similarity" in next(one for one in trainer.state.log_history if "loss" in one)


def test_a_short_idleness_is_no_death():
    assert dead_alarm(TEXT_17, [0, 799, 0, 0], 799, AlarmLimits()) is None
    alarm = dead_alarm(TEXT_17, [0, 800, 900, 0], 1000, AlarmLimits())
    assert alarm.words.startswith(
        "Dead experts in layer 17 of the LLM: experts 1, 2 of 4 got none of the last 800 assignments."
    )


def test_idleness_ends_with_the_first_token():
    load, watch = RouterLoad(models.sparse_model()), RouterLoadCallback().watch
    for counts in ([300, 0], [300, 0], [0, 300], [300, 0]):
        load.counts = {TEXT_17: torch.tensor([counts, [0, 0]])}
        load.open = {TEXT_17: torch.tensor([[True, True], [False, False]])}
        assert watch.look(load, {}, 1) == ([] if watch.idle[TEXT_17][1] < 400 else watch.alarms)
    assert watch.idle[TEXT_17].tolist() == [0, 300]
    assert [alarm.kind for alarm in watch.alarms] == [DEAD]


def test_experts_that_are_closed_to_all_tokens_are_not_dead():
    """Text alone through a model whose image tokens have experts of their own."""
    model = models.sparse_model(text_moe=models.EXPERTS | {"modality_routing": "isolated"})
    with RouterLoad(model) as load, torch.no_grad():
        model(**models.batch((0,), num_text=200))
    assert load.counts["text", 0].sum(0)[:2].tolist() == [0, 0]
    assert load.summary()["text", 0].dead_experts == 0
    assert RouterLoadCallback(limits=EAGER).watch.look(load, {}, 1) == []


def test_identical_experts_are_given_time_in_training_and_none_on_the_page():
    limits = AlarmLimits()
    assert identical_alarm(TEXT_17, 0.0, limits, steps=199) is None
    assert "after 200 steps" in identical_alarm(TEXT_17, 0.0, limits, steps=200).words
    assert "lora_targets" in identical_alarm(TEXT_17, 0.0, limits).words
    assert identical_alarm(TEXT_17, 1e-3, limits) is None
    assert (
        RouterLoadCallback()
        .watch.look(RouterLoad(models.sparse_model()), {TEXT_17: Similarity(1.0, 0.0)}, 200)[0]
        .kind
        == IDENTICAL
    )


def test_few_tokens_do_not_saturate_a_router():
    limits = AlarmLimits()
    assert saturated_alarm(TEXT_17, 0.999, 999, limits, "image") is None
    assert saturated_alarm(TEXT_17, 0.99, 10**6, limits, "image") is None
    said = saturated_alarm(("connector", None), 0.9951, 12345, limits, "image").words
    assert said.startswith(
        "Router saturated in the connector: its mean top probability is 0.995 over 12,345 image tokens"
    )
