"""Learning rates, weight decays and warm-ups of parts: what torch's own groups give, also resumed."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, get_scheduler

from modeling_vlmoe.finetune import build_trainer, finetune, load_chat_data, load_finetuned, prepare_model
from modeling_vlmoe.finetune.trained.cells import parameter_cells

RATES = {"experts": 1e-3, "routers": 1e-2, "vision": 2e-3, "vision.experts": 5e-4}
DECAYS = {"experts": 0.1, "vision": 0.0, "connector": 0.3}
WARMUPS = {"routers": 3, "vision": 0.5}
EVERYTHING = {
    "method": "full",
    "learning_rates": RATES,
    "weight_decays": DECAYS,
    "warmups": WARMUPS,
    "weight_decay": 0.05,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_steps": 6,
    "save_strategy": "no",
    "router_alarms": False,
    "adam_epsilon": 1e-3,  # the keys' biases of an attention have gradients of zero, whose rounding Adam would enlarge
}


def hand_set(cell, settings, rest):
    """What holds for a cell, said in plain words."""
    tower = cell.partition(".")[0] if "." in cell else "text"
    return settings.get(cell, settings.get(tower, rest))


def is_decayed(name):
    return not any(piece in name for piece in ("bias", "norm"))


def hand_loop(model, batches, num_steps):
    """The oracle: torch's AdamW over a group per parameter, and the host's schedule for each."""
    cells, groups, lambdas = parameter_cells(model), [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        cell = cells[name]
        decay = hand_set(cell, DECAYS, 0.05) if is_decayed(name) else 0.0
        groups.append({"params": [parameter], "lr": hand_set(cell, RATES, 4e-3), "weight_decay": decay})
        warmup = {"routers": 3}.get(cell, 3 if cell.startswith("vision.") else 2)  # half of six steps
        alone = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        lambdas.append(get_scheduler("cosine", alone, warmup, num_steps).lr_lambdas[0])
    optimizer = torch.optim.AdamW(groups, eps=1e-3)
    first = [group["lr"] for group in groups]
    for step, batch in enumerate(batches):
        for group, rate, by_step in zip(optimizer.param_groups, first, lambdas, strict=True):
            group["lr"] = rate * by_step(step)
        targets = (batch["labels"][:, 1:] >= 0).sum()
        model(**batch, num_items_in_batch=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_([one for one in model.parameters() if one.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_rates_decays_and_warmups_of_parts_are_those_of_a_hand_written_loop(base, processor, pictures, arguments):
    rows, args = load_chat_data(pictures, "test"), arguments(**EVERYTHING)
    model = AutoModelForImageTextToText.from_pretrained(base)
    trainer = build_trainer(model, processor, rows, args)
    batches, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *a, **k: (
        batches.append(dict(inputs)) or compute(model, inputs, *a, **k)
    )
    trainer.train()
    oracle = AutoModelForImageTextToText.from_pretrained(base)
    prepare_model(oracle, args)
    hand_loop(oracle.train(), batches, 6)
    start = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    for name, wanted in oracle.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], wanted, rtol=0, atol=1e-6, msg=name)
    moved = {name for name, value in start.items() if not torch.equal(value, model.state_dict()[name])}
    trained = {name for name, one in model.named_parameters() if one.requires_grad and "k_proj.bias" not in name}
    assert trained <= moved


def test_logged_rates_are_the_groups(model, processor, pictures, arguments):
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), arguments(**EVERYTHING))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6
    first, third = logs[0], logs[3]
    assert first["learning_rate/routers"] == 0.0
    assert third["learning_rate/routers"] == pytest.approx(1e-2)
    assert third["learning_rate/vision"] == pytest.approx(2e-3)
    assert logs[2]["learning_rate"] == logs[2]["learning_rate/rest"] == pytest.approx(4e-3)
    parts = {name.partition("/")[2] for name in first if name.startswith("learning_rate/")}
    assert parts == {"rest", "experts", "routers", "vision", "vision.experts", "connector"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_resumed_run_with_groups_is_the_uninterrupted_one(method, arguments, tmp_path):
    given = {"learning_rates": {"experts": 1e-3, "routers": 5e-2}, "warmups": {"routers": 3}, "method": method}
    given |= {"max_steps": 4, "save_steps": 2, "save_total_limit": None}
    whole = finetune(arguments(**given, output_dir=str(tmp_path / "whole")))
    resumed = finetune(
        arguments(**given, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(whole / "checkpoint-2"))
    )
    first, second = (load_finetuned(folder)[0].state_dict() for folder in (whole, resumed))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=name)
    states = [
        json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"][-1]
        for folder in (whole, resumed)
    ]
    assert states[0]["learning_rate/routers"] == states[1]["learning_rate/routers"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_part_with_rate_zero_stays_as_it_was_bit_by_bit(method, model, processor, pictures, arguments):
    given = {"learning_rates": {"experts": 0, "routers": 0.0}, "weight_decay": 0.1, "method": method}
    args = arguments(**given, save_strategy="no", max_steps=3)
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), args)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    still = {name for name in before if "language_model" in name and (".experts." in name or ".router." in name)}
    assert still
    assert not still & changed
    others = {name for name in before.keys() - still if "lora_A" not in name and "k_proj.bias" not in name}
    assert others <= changed


def test_lora_on_attention_and_on_experts_and_whole_modules_have_rates_of_their_own(
    model, processor, pictures, arguments
):
    rates = {"attention": 1e-3, "experts": 2e-3, "connector": 3e-3}
    args = arguments(learning_rates=rates, train_connector=True, lr_scheduler_type="constant", save_strategy="no")
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), args)
    trainer.train()
    found = {id(one): group["lr"] for group in trainer.optimizer.param_groups for one in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            part = "connector" if ".connector." in name else "experts" if ".experts." in name else None
            part = part or ("attention" if ".self_attn." in name else None)
            assert found[id(parameter)] == rates.get(part, 1e-2), name


def test_without_settings_the_hosts_two_groups_are_left_alone(model, processor, pictures, arguments):
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), arguments(method="full"))
    assert len(trainer.create_optimizer().param_groups) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"learning_rates": {"router": 1}},
            "learning_rates names 'router'; expected some of .* Did you mean 'routers'",
        ),
        ({"learning_rates": {"moe-layers": 1}}, "learning_rates names 'moe-layers'.* a preset may overlap others"),
        ({"learning_rates": {"routers": -1}}, "learning_rates.routers is -1; expected a number of 0 or more"),
        ({"learning_rates": {"routers": "fast"}}, "learning_rates.routers is 'fast'; expected a number"),
        ({"learning_rates": {"routers": True}}, "learning_rates.routers is True; expected a number"),
        ({"learning_rates": "routers"}, "learning_rates is 'routers'; expected parts and a number for each"),
        ({"warmups": {"routers": 1.5}}, "warmups has 1.5; expected whole steps, or a share"),
        ({"warmups": {"routers": 2}, "lr_scheduler_type": "constant"}, "lr_scheduler_type constant has no warm-up"),
        (
            {"warmups": {"routers": 2}, "lr_scheduler_type": "greedy", "eval_strategy": "steps"},
            "lr_scheduler_type greedy is no schedule of steps",
        ),
    ],
    ids=str,
)
def test_raises_when_a_group_cannot_be(given, message, arguments):
    with pytest.raises(ValueError, match=message):
        arguments(method="full", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"learning_rates": {"vision": 1e-3}},
            "learning_rates names vision, but it is not trained: trained are .*rout",
        ),
        ({"method": "align", "warmups": {"experts": 2}}, "warmups names experts, but it is not trained"),
        (
            {
                "method": "full",
                "learning_rates": {"vision": 0.1}
                | {
                    f"vision.{kind}": 0.2 for kind in ("experts", "routers", "attention", "mlp", "norms", "embeddings")
                },
            },
            "learning_rates names vision, but more exact names cover it",
        ),
        (
            {"method": "full", "weight_decays": {"norms": 0.1}},
            "weight_decays names norms, but biases and norms do not decay",
        ),
    ],
    ids=["lora", "align", "covered", "norms"],
)
def test_raises_when_a_group_names_what_is_not_trained(given, message, model, processor, arguments):
    with pytest.raises(ValueError, match=message):
        build_trainer(model, processor, [], arguments(**given))


def test_numbers_as_yaml_reads_them_and_as_a_command_line_gives_them(arguments):
    assert arguments(learning_rates={"routers": "1e-3"}).learning_rates == {"routers": 1e-3}
    assert arguments(learning_rates='{"routers": 0.5}').learning_rates == {"routers": 0.5}
    assert arguments(learning_rates={}).learning_rates is None
    assert "learning_rates" in arguments().settings()
