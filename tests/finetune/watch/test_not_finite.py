"""A loss, a gradient or a weight that is not finite stops a run at once, in words, and nothing of it is written."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file

from modeling_vlmoe.finetune import build_trainer, finetune, load_chat_data, watch_training
from modeling_vlmoe.finetune.watch.account import ALARMS_NAME, NOT_FINITE, TrainingFailed
from modeling_vlmoe.finetune.watch.row_notes import name_rows


def make(arguments, model, processor, pictures, split="train", **given):
    args = arguments(**{"max_steps": 4, "per_device_train_batch_size": 2} | given)
    return build_trainer(model, processor, load_chat_data(pictures, split), args)


def stopped(trainer, **kwargs):
    """What a run says when it ends."""
    with pytest.raises(ValueError, match="Training stopped at step") as failed:
        trainer.train(**kwargs)
    assert isinstance(failed.value, TrainingFailed)
    return str(failed.value)


def alarms(folder):
    return json.loads((folder / ALARMS_NAME).read_text())["alarms"]


def no_spoiled_weights(folder):
    """No weight that a run has left is not finite."""
    files = list(folder.rglob("*.safetensors"))
    return all(torch.isfinite(one).all() for path in files for one in load_file(path).values())


def test_a_weight_that_is_not_finite_is_named_before_the_first_step(arguments, model, processor, pictures, tmp_path):
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.router.weight[0, 0] = math.inf
    said = stopped(make(arguments, model, processor, pictures, save_steps=1))
    assert said.startswith("Training stopped at step 1: the loss is not finite, of row")
    assert "First not finite: the weights of the router of layer 1 of the LLM" in said
    assert "check its checkpoint" in said
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    (alarm,) = alarms(tmp_path / "out")
    assert (alarm["kind"], alarm["step"], alarm["words"]) == (NOT_FINITE, 1, said)


def test_a_learning_rate_that_is_far_too_high_ends_the_run_before_anything_spoiled_is_written(
    arguments, base, pictures, tmp_path
):
    """Through the command's own function: checkpoints of good steps stay, there is no result."""
    args = arguments(learning_rate=1e30, max_steps=6, save_steps=1, train_connector=True, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="Training stopped at step") as failed:
        finetune(args)
    said = str(failed.value)
    assert re.search(r"Lower the learning rate \(\d.*e\+29; try learning_rate=\d.*e\+28\)\.", said)
    assert "warmup_steps=0.03" in said
    assert "max_grad_norm=1.0 (it is 0.0)" in said
    assert "gradient norms" in said
    assert no_spoiled_weights(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert [one["kind"] for one in alarms(tmp_path / "out")][-1] == NOT_FINITE


def test_a_first_step_that_spoils_the_weights_is_not_taken_for_a_broken_checkpoint(
    arguments, model, processor, pictures
):
    trainer = make(arguments, model, processor, pictures, save_steps=1)
    make_step = trainer.create_optimizer

    def spoiling(*args, **kwargs):
        optimizer = make_step(*args, **kwargs)
        optimizer.register_step_post_hook(
            lambda *_: next(iter(optimizer.param_groups[0]["params"])).data.fill_(math.nan)
        )
        return optimizer

    trainer.create_optimizer = spoiling
    said = stopped(trainer)
    assert said.startswith("Training stopped at step 1: its step made weights that are not finite.")
    assert "Lower the learning rate (" in said
    assert "check its checkpoint" not in said


def test_the_rows_and_the_image_are_named(arguments, model, processor, pictures, tmp_path):
    """One image of one row: its row is named, out of a batch of four."""
    args = arguments(max_steps=3, per_device_train_batch_size=4, train_sampling_strategy="sequential")
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), args)
    collate = trainer.data_collator

    def spoil(rows):
        batch = collate(rows)
        batch["pixel_values"][2, 0, 0, 0] = math.nan
        return batch

    trainer.data_collator = spoil
    said = stopped(trainer)
    assert "the loss is not finite, of row 3 of the data." in said
    assert "First not finite: the input pixel_values, number 3 of 4." in said
    assert "Check that row" in said


def test_an_overflow_of_float16_names_the_part_and_bfloat16(arguments, model, processor, pictures):
    model.half()
    with torch.no_grad():
        model.lm_head.weight.mul_(4e4)
    said = stopped(make(arguments, model, processor, pictures, learning_rate=1e-4))
    assert "First not finite: what the head (base_model.model.lm_head) computes" in said
    assert "in float16, whose largest number is 6.55e+04" in said
    assert "dtype=bfloat16" in said


def test_a_gradient_that_is_not_finite_is_named_where_the_loss_is_finite(arguments, model, processor, pictures):
    trainer = make(arguments, model, processor, pictures)
    (name, router), *_ = [
        (name, one)
        for name, one in trainer.model.named_parameters()
        if "layers.2.mlp.router" in name and one.requires_grad
    ]
    router.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), math.nan))
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    said = stopped(trainer)
    assert said.startswith("Training stopped at step 1: a gradient is not finite, of rows ")
    assert f"First not finite: the gradient of the router of layer 2 of the LLM ({name})." in said
    for name, one in trainer.model.named_parameters():
        assert torch.equal(one, before[name]), name


def test_the_figures_are_those_of_the_steps_before(arguments, model, processor, pictures):
    """Losses and norms of the steps that were made are said; accumulated micro-batches count as one step."""
    trainer = make(arguments, model, processor, pictures, gradient_accumulation_steps=2, max_steps=3, logging_steps=1)
    make_step, count = trainer.training_step, iter(range(100))

    def spoiled(*args, **kwargs):
        if next(count) == 5:  # the second micro-batch of the third step
            with torch.no_grad():
                trainer.model.base_model.model.lm_head.weight[:] = math.nan
        return make_step(*args, **kwargs)

    trainer.training_step = spoiled
    said = stopped(trainer)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert said.startswith("Training stopped at step 3: the loss is not finite")
    assert f"Before: losses {', '.join(f'{loss:.4g}' for loss in logged)}; gradient norms " in said
    assert f"learning rate {trainer.optimizer.param_groups[0]['lr']:.3g}" in said


def test_a_run_goes_on_from_the_checkpoint_that_is_named(arguments, base, pictures, tmp_path, monkeypatch):
    from modeling_vlmoe.finetune import train as home

    build = home.build_trainer

    def spoiled(*args, **kwargs):
        trainer = build(*args, **kwargs)
        make_step = trainer.training_step

        def look(model, inputs, *given, **named):
            if trainer.state.global_step == 2:
                inputs["pixel_values"] = inputs["pixel_values"] * math.nan
            return make_step(model, inputs, *given, **named)

        trainer.training_step = look
        return trainer

    monkeypatch.setattr(home, "build_trainer", spoiled)
    with pytest.raises(ValueError, match=r"The last checkpoint is .*checkpoint-2: resume_from_checkpoint="):
        finetune(arguments(max_steps=3, save_steps=1))
    monkeypatch.setattr(home, "build_trainer", build)
    folder = finetune(arguments(max_steps=3, save_steps=1, resume_from_checkpoint="true"))
    assert (folder / "adapter_config.json").is_file()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_row_numbers_reach_the_step_and_not_the_model(arguments, model, processor, pictures, workers):
    trainer = make(arguments, model, processor, pictures, max_steps=4, dataloader_num_workers=workers)
    seen, forward = [], model.forward

    def note(*args, **kwargs):
        assert "watched_rows" not in kwargs
        return forward(*args, **kwargs)

    model.forward = note
    watch = next(one for one in trainer.callback_handler.callbacks if type(one).__name__ == "TrainingWatch")
    make_step = trainer.training_step

    def step(*args, **kwargs):
        loss = make_step(*args, **kwargs)
        seen.extend(row for rows in watch._step.rows for row in rows)
        return loss

    trainer.training_step = step
    trainer.train()
    assert sorted(seen) == [f"Row {number} of {seen[0].partition(' of ')[2]}" for number in range(1, 9)]


def test_rows_are_named_by_their_sources():
    rows = ["Row 12 of b.jsonl", "Row 3 of a.jsonl", "Row 7 of b.jsonl", "Row 3 of a.jsonl"]
    assert name_rows(rows) == "row 3 of a.jsonl; rows 7 and 12 of b.jsonl"
    assert name_rows(["A row of the data"]) == "rows of the data"
    assert name_rows([]) == "rows that are not known"


def test_a_healthy_run_leaves_no_account(arguments, tmp_path):
    folder = finetune(arguments())
    assert not (folder / ALARMS_NAME).exists()


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_it_is_switched_off(arguments, model, processor, pictures, tmp_path, number):
    """The run goes on, and its log holds each layer's load."""
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.router.weight[0, :] = number
    trainer = make(arguments, model, processor, pictures, watch=False, max_steps=1)
    trainer.train()
    assert not (tmp_path / "out" / ALARMS_NAME).exists()
    assert any(name.endswith("/1/max_load") or "1/max_load" in name for name in trainer.state.log_history[0])


def test_raises_when_steps_are_negative(arguments, model, processor, pictures):
    trainer = make(arguments, model, processor, pictures, watch=False)
    with pytest.raises(ValueError, match="steps is -1; expected 0 or more"):
        watch_training(trainer, steps=-1)
