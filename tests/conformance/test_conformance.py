"""Router losses reach the router, whole and once, under every trainer (`python -m tests.conformance`: the table)."""

from functools import cache

import pytest
import torch
import transformers

from modeling_vlmoe.finetune import follow_trainer
from modeling_vlmoe.finetune.router_load import find_body
from tests.slow import often

from . import run
from .broken import MISTAKES, SPREAD_MISTAKE, made
from .run import SETTINGS, measure, train
from .spread import SPREADS, measure_spread
from .table import LIMIT, SMALLEST_MISTAKE
from .trainers import KINDS, build, processor

pytestmark = pytest.mark.filterwarnings("ignore")  # trainers' own
HELPED = [name for name, kind in KINDS.items() if kind.needs_help]


right = cache(measure)  # nobody's mistakes: the same cell for every test


def holds(cell: run.Cell) -> None:
    assert cell.task > 0.1
    assert cell.auxiliary > 0.1
    assert cell.gap <= LIMIT


# Every setting under the two trainers that most use, and the one that all need under all; the others are slow.
EVERY_SETTING = ("Trainer", "TRL SFT")
CELLS = [
    pytest.param(name, setting, marks=() if name in EVERY_SETTING or setting == "accumulation" else pytest.mark.slow)
    for name in KINDS
    for setting in SETTINGS
]


@pytest.mark.parametrize(("name", "setting"), CELLS)
def test_the_gradient_is_the_oracles(name, setting):
    holds(right(name, setting, "both"))


@pytest.mark.parametrize("loss", ["balance", "z"])
@pytest.mark.parametrize("name", KINDS)
def test_each_loss_alone(name, loss):
    holds(right(name, "accumulation", loss))


@pytest.mark.parametrize("spread", often(SPREADS, "ddp"))
def test_two_processes(spread):
    cells = measure_spread(spread)
    assert set(cells) == set(KINDS)
    for cell in cells.values():
        holds(cell)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: f"{one.what}: {one.trainer}")
def test_a_mistake_is_found(mistake):
    holds(right(mistake.trainer, mistake.setting, mistake.loss))
    with made(mistake):
        assert measure(mistake.trainer, mistake.setting, mistake.loss).gap > SMALLEST_MISTAKE


@pytest.mark.slow
def test_a_mistake_among_two_processes_is_found():
    cell = measure_spread("ddp", "--broken", SPREAD_MISTAKE.trainer)[SPREAD_MISTAKE.trainer]
    assert cell.gap > SMALLEST_MISTAKE


@pytest.mark.parametrize("name", KINDS)
def test_losses_are_logged_per_layer_and_tower(name, tmp_path):
    trainer = build(
        name,
        run.make_model(),
        processor(),
        str(tmp_path),
        num_rows=4,
        per_device_train_batch_size=2,
        max_steps=2,
        logging_strategy="steps",
        logging_steps=1,
    )
    follow_trainer(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        for layer in (*(f"text/layer_{i}" for i in range(3)), "vision/layer_1", "vision/layer_2", "connector"):
            assert entry[f"router/{layer}/balance_loss"] > 0
            assert entry[f"router/{layer}/z_loss"] > 0


@pytest.fixture
def warnings_of_the_model(monkeypatch):
    """What the model's module has warned about, a warning that was given before included."""
    from modeling_vlmoe import router_losses

    said: list[str] = []
    transformers.utils.logging.warning_once.cache_clear()
    monkeypatch.setattr(router_losses, "_looks_for_unseen", True)
    monkeypatch.setattr(router_losses.logger, "warning", lambda message, *args, **kwargs: said.append(message))
    return said


@pytest.mark.parametrize("name", KINDS)
def test_training_without_the_line_warns_once(name, warnings_of_the_model):
    train(name, SETTINGS["accumulation"], run.LOSSES["both"], helped=False)
    if not KINDS[name].needs_help:
        assert warnings_of_the_model == []
        return
    (message,) = warnings_of_the_model
    assert "follow_trainer(trainer)" in message


@pytest.mark.parametrize("name", HELPED)
def test_training_with_the_line_warns_of_nothing(name, warnings_of_the_model):
    train(name, SETTINGS["accumulation"], run.LOSSES["both"])
    assert warnings_of_the_model == []


def test_a_loop_of_ones_own_says_its_share(warnings_of_the_model):
    model, (inputs, *_) = run.make_model().train(), [{"input_ids": torch.arange(6, 14)[None]}]
    model.model.micro_batch_share = 0.25
    model.model(**inputs).last_hidden_state.mean().backward()
    assert warnings_of_the_model == []
    gradients = []
    for share in (0.25, 0.5, 1.0):
        model.zero_grad()
        model.model.micro_batch_share = share
        model.model(**inputs).last_hidden_state.mean().backward()
        gradients.append(model.model.language_model.layers[2].mlp.router.weight.grad.clone())
    quarter, half = gradients[1] - gradients[0], gradients[2] - gradients[1]
    assert quarter.norm() > 0
    torch.testing.assert_close(half, 2 * quarter, atol=1e-6, rtol=1e-4)


def test_a_body_inside_an_adapter_is_followed(tmp_path):
    """A wrapper hands attributes on, so that they must not be set on it."""
    wrapped = run.with_lora(run.make_model().model)
    assert find_body(wrapped) is wrapped.base_model.model


def test_raises_when_the_trainer_has_another_model(tmp_path):
    trainer = transformers.Trainer(
        torch.nn.Linear(2, 2), transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    )
    with pytest.raises(ValueError, match="holds no vlmoe model"):
        follow_trainer(trainer)
