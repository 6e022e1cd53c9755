"""Runs of a few steps: what they train, log, evaluate and refuse."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.finetune import build_trainer, finetune, load_chat_data, load_finetuned, parse_recipe
from modeling_vlmoe.finetune.callbacks import SHOWN
from modeling_vlmoe.finetune.recipes import shipped_recipes
from modeling_vlmoe.finetune.settings import SETTINGS_NAME
from tests.finetune.questions import question, write_rows


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_shipped_recipe_trains_two_steps(recipe, base, delta_base, pictures, tmp_path):
    start = delta_base if recipe == "delta" else base
    given = [f"model={start}", f"data={pictures / 'test.jsonl'}", f"output_dir={tmp_path / 'out'}", "max_steps=2"]
    folder = finetune(parse_recipe(recipe, [*given, "logging_steps=1", "use_cpu=true", "disable_tqdm=true"]))
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert any((folder / "runs").rglob("events.out.tfevents*"))
    assert (folder / "upcycle_receipt.json").read_text() == '{"seed": 0}'
    assert f"method: {recipe}" in (folder / "finetune_settings.yaml").read_text()


def test_align_changes_the_connector_only(base, arguments):
    before, after = weights(base), weights(finetune(arguments(method="align", lora_r=1)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.connector.") for name in changed)


def test_lora_leaves_the_base_untouched(base, arguments):
    model, _ = load_finetuned(finetune(arguments(train_connector=True)))
    before = weights(base)
    for name, value in model.unload().state_dict().items():
        assert torch.equal(before[name], value) or ".router." in name or ".connector." in name, name


def test_loss_falls_on_eight_samples(model, processor, pictures, arguments):
    args = arguments(max_steps=25, per_device_train_batch_size=8, save_strategy="no", logging_steps=1)
    trainer = build_trainer(model, processor, load_chat_data(pictures, "train"), args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("method", ["align", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(method, arguments, tmp_path):
    settings = {"method": method, "max_steps": 4, "save_steps": 2, "save_total_limit": None, "train_connector": True}
    whole = finetune(arguments(**settings, output_dir=str(tmp_path / "whole")))
    resumed = finetune(
        arguments(**settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=str(whole / "checkpoint-2"))
    )
    first, second = (load_finetuned(folder)[0].state_dict() for folder in (whole, resumed))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=name)


def test_each_layers_load_is_logged(arguments, model, processor, pictures):
    args = arguments(report_to=["tensorboard"], train_connector=True)
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), args)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    layers = [*(f"text/layer_{index}" for index in range(3)), "vision/layer_1", "vision/layer_2", "connector"]
    for layer in layers:
        assert 0.25 <= first[f"router/{layer}/max_load"] <= 1
        assert 0 <= first[f"router/{layer}/entropy"] <= 1.0001
        assert first[f"router/{layer}/dead_experts"] in range(4)
        assert first[f"router/{layer}/balance_loss"] > 0
        assert first[f"router/{layer}/z_loss"] > 0
    assert first["router/max_load"] == max(first[f"router/{layer}/max_load"] for layer in layers)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (path.parent for path in trainer_runs(args).rglob("events.out.tfevents*"))
    logged = EventAccumulator(str(events)).Reload()
    assert "train/router/text/layer_0/max_load" in logged.Tags()["scalars"]
    assert len(logged.Scalars("train/router/connector/entropy")) == 2


def trainer_runs(args):
    from pathlib import Path

    return Path(args.output_dir) / "runs"


def test_printed_logs_are_short(arguments, model, processor, pictures, capsys):
    build_trainer(model, processor, load_chat_data(pictures, "test"), arguments(save_strategy="no")).train()
    printed = capsys.readouterr().out
    assert all(name in printed for name in SHOWN)
    assert "layer_" not in printed


def test_no_load_is_logged_where_nothing_is_sparse(dense_base, processor, pictures, arguments):
    model = AutoModelForImageTextToText.from_pretrained(dense_base)
    trainer = build_trainer(model, processor, load_chat_data(pictures, "test"), arguments(save_strategy="no"))
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if name.startswith("router/")]


@pytest.mark.parametrize("method", ["align", "lora"])
def test_compute_metrics_gets_plain_logits(method, model, processor, pictures, arguments):
    model.config.text_config.output_router_logits = True
    rows, seen = load_chat_data(pictures, "train"), {}

    def compute_metrics(prediction):
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"seen": 1.0}

    args = arguments(method=method, per_device_eval_batch_size=8)
    metrics = build_trainer(model, processor, rows, args, rows, compute_metrics).evaluate()
    assert metrics["eval_seen"] == 1.0
    assert seen["logits"].shape == (*seen["labels"].shape, model.config.text_config.vocab_size)
    assert metrics["eval_loss"] > 0


def test_evaluation_loss_is_written(arguments, pictures):
    folder = finetune(arguments(data=str(pictures), train_split="train", eval_split="test"))
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] > 0


def test_evaluation_does_not_count_as_load(arguments, model, processor, pictures):
    rows = load_chat_data(pictures, "test")
    args = arguments(eval_strategy="steps", eval_steps=1, save_strategy="no", logging_steps=2, max_steps=2)
    trainer = build_trainer(model, processor, rows, args, rows)
    callback = trainer.callback_handler.callbacks[0]
    totals = []
    trainer.log, log = lambda logs, *rest: (totals.append(dict(callback.load.counts)), log(logs, *rest)), trainer.log
    trainer.train()
    length = sum(int(trainer.data_collator([row])["attention_mask"].sum()) for row in rows)
    counted = [int(total[("text", 0)].sum()) for total in totals if total]
    assert 2 * 2 * length in counted  # two steps of four rows, two experts per token; eval passes add nothing
    assert max(counted) == 2 * 2 * length


def test_raises_when_align_has_text_only_rows(arguments, pictures):
    with pytest.raises(ValueError, match="Row 8 of the data has no image, but method align"):
        finetune(arguments(method="align", data=str(pictures)))


def test_raises_when_the_output_folder_is_taken(arguments, tmp_path, base, pictures):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        finetune(arguments())
    with pytest.raises(ValueError, match=r"has no finetune_settings.yaml. Name another folder, or empty it yourself"):
        finetune(arguments(force=True))
    assert (tmp_path / "out" / "notes.txt").exists()
    with pytest.raises(ValueError, match="is or holds the model"):
        finetune(arguments(output_dir=str(base), force=True))
    with pytest.raises(ValueError, match="is or holds the data"):
        finetune(arguments(output_dir=str(pictures), force=True))


@pytest.fixture
def earlier(tmp_path):
    """A folder as a run has left it."""
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / SETTINGS_NAME).write_text("method: lora\n")
    return tmp_path / "out"


def test_force_empties_what_an_earlier_run_has_left(arguments, earlier):
    finetune(arguments(force=True, save_strategy="no"))
    assert not (earlier / "notes.txt").exists()
    assert not (earlier / "checkpoint-2").exists()
    assert (earlier / "adapter_model.safetensors").exists()


def test_force_never_deletes_the_datas_images(arguments, earlier, pictures, tmp_path):
    shutil.copytree(pictures / "images", earlier / "images")
    data = write_rows(tmp_path / "rows.jsonl", [question(["out/images/red.png"], "red")])
    with pytest.raises(ValueError, match=r"would delete .*red.png, an image of the data"):
        finetune(arguments(data=str(data), force=True))
    assert (earlier / "images" / "red.png").exists()


def test_force_never_deletes_the_recipe(arguments, earlier, base, pictures):
    recipe = earlier / "mine.yaml"
    recipe.write_text(f"model: {base}\ndata: {pictures / 'test.jsonl'}\nreport_to: none\nuse_cpu: true\n")
    with pytest.raises(ValueError, match=r"would delete the recipe .*mine.yaml"):
        finetune(parse_recipe(recipe, [f"output_dir={earlier}", "force=true"]))
    assert recipe.exists()


def test_force_never_deletes_the_checkpoint_to_continue_from(arguments, earlier):
    with pytest.raises(ValueError, match=r"would delete the checkpoint to continue from .*checkpoint-2"):
        finetune(arguments(force=True, resume_from_checkpoint="true"))
    assert (earlier / "checkpoint-2").exists()


def test_a_checkpoint_elsewhere_does_not_open_a_folder_that_is_taken(arguments, earlier, tmp_path):
    (tmp_path / "elsewhere" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty"):
        finetune(arguments(resume_from_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-2")))


def test_force_keeps_the_folder_when_the_run_cannot_start(arguments, earlier, tmp_path):
    with pytest.raises(ValueError, match="max_length"):
        finetune(arguments(force=True, max_length=3))
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "/nowhere/at/all"}, "neither a folder nor can it be had from the Hub"),
        ({"data": "/nowhere/at/all"}, "Cannot load the data"),
        ({"eval_split": "test"}, "data is the single file"),
        ({"eval_strategy": "epoch"}, "nothing to evaluate on"),
        ({"resume_from_checkpoint": "true"}, "holds no checkpoint"),
        ({"resume_from_checkpoint": "/nowhere"}, "there is no such folder"),
        ({"max_length": 5}, "Row 1 of the data is .* beyond max_length 5"),
        ({"output_dir": "/proc/x"}, "output_dir /proc/x cannot be made"),
    ],
)
def test_raises_before_training_when(arguments, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune(arguments(**given))
    assert not (tmp_path / "out").exists()


def test_raises_when_the_model_is_another_architecture(arguments, tmp_path):
    from tests import tiny

    tiny.save_text_parent(tmp_path / "llama", "llama")
    with pytest.raises(ValueError, match="is a llama model; expected a vlmoe one"):
        finetune(arguments(model=str(tmp_path / "llama")))


def test_raises_when_the_processor_is_another_models(model, processor, arguments):
    model.config.image_token_id = 7
    with pytest.raises(ValueError, match=r"The processor's image token is \d+, but the model's image_token_id is 7"):
        build_trainer(model, processor, [], arguments())


def test_raises_before_the_weights_are_read_when_a_row_cannot_be_learnt(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.finetune.train.load_base", None)
    data = write_rows(tmp_path / "rows.jsonl", [question([], "red"), question([], "red", "which <image>?")])
    with pytest.raises(ValueError, match="Row 2 of the data has <image> in its text"):
        finetune(arguments(data=str(data)))


def test_an_unreadable_image_stops_the_run_with_its_row(arguments, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    data = write_rows(tmp_path / "rows.jsonl", [question(["bad.png"], "red")])
    with pytest.raises(ValueError, match=r"Row 1 of the data: cannot read the image .*bad.png"):
        finetune(arguments(data=str(data)))
