"""What a run leaves tells where the model comes from, what it was trained on and how: result, checkpoints, merged."""

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.finetune import finetune, merge_adapter
from modeling_vlmoe.finetune.evaluation_file import write_evaluation
from modeling_vlmoe.finetune.history import describe_run, describe_settings
from modeling_vlmoe.model_cards import is_rendered, write_card
from modeling_vlmoe.model_cards.sections import describe_run as told_on_the_card
from modeling_vlmoe.weight_fingerprint import fingerprint
from tests import tiny
from tests.model_cards.folders import licence, parent, receipt, share

PARENTS = {"text": parent("a/llm", licence("mit")), "vision": parent("b/vit", licence("mit"))}


@pytest.fixture
def started(base, tmp_path):
    """The tiny model with a whole receipt and a card."""
    folder = shutil.copytree(base, tmp_path / "started")
    (folder / "upcycle_receipt.json").write_text(json.dumps(receipt(**PARENTS)))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base, in a person's words\n")
    return folder


def history(folder):
    return json.loads((folder / "training_history.json").read_text())


def check_told(folder, started, methods, licence="apache-2.0"):
    """Receipt, history and card are there, tell of these runs, and name no path of the machine."""
    assert (folder / "upcycle_receipt.json").read_bytes() == (started / "upcycle_receipt.json").read_bytes()
    assert [run["method"] for run in history(folder)] == methods
    text = (folder / "README.md").read_text()
    assert is_rendered(text)
    assert history(folder)[-1]["weights"] == fingerprint(folder)
    assert "changed" not in text
    card = ModelCard(text)
    assert card.data.license == licence
    assert all(f"{number}. `{method}` of" in text for number, method in enumerate(methods, 1))
    for one in (text, (folder / "training_history.json").read_text()):
        assert str(started.parent) not in one
    return card


def test_every_stage_is_told_in_every_folder(started, arguments, tmp_path, pictures):
    aligned = finetune(
        arguments(method="align", model=str(started), output_dir=str(tmp_path / "aligned"), save_steps=1)
    )
    for folder in (aligned, aligned / "checkpoint-1", aligned / "checkpoint-2"):
        card = check_told(folder, started, ["align"])
        assert card.data.base_model == ["a/llm", "b/vit"]
    assert [history(aligned / name)[0]["steps"] for name in ("checkpoint-1", ".")] == [1, 2]
    given = {"model": str(aligned), "merge": True, "eval_data": str(pictures / "test.jsonl")}
    tuned = finetune(arguments(**given, output_dir=str(tmp_path / "tuned")))
    for folder in (tuned, tuned / "checkpoint-2"):
        card = check_told(folder, started, ["align", "lora"])
        assert card.data.library_name == "peft"
        assert card.data.base_model is None  # a folder of this machine
    assert "The loss on held-out rows was" in (tuned / "README.md").read_text()
    again = merge_adapter(tuned, tmp_path / "again")
    for folder in (tuned / "merged", again):
        card = check_told(folder, started, ["align", "lora"])
        assert card.data.base_model == ["a/llm", "b/vit"]
        assert (card.data.base_model_relation, card.data.library_name) == ("merge", "transformers")
    run = history(again)[1]
    assert run["model"]["name"] == "aligned"
    assert run["data"] == {"name": "test.jsonl", "hub_id": None, "rows": 4}
    assert run["settings"]["lora_r"] == 4
    assert "output_dir" not in run["settings"]


@pytest.mark.slow
def test_an_edited_card_of_a_result_outlives_a_resumed_run(started, arguments, tmp_path):
    out = finetune(arguments(method="align", model=str(started), save_steps=1))
    edited = (out / "README.md").read_text().replace("## Limits", "## My limits")
    (out / "README.md").write_text(edited)
    finetune(arguments(method="align", model=str(started), max_steps=3, resume_from_checkpoint="true"))
    assert (out / "README.md").read_text() == edited
    assert history(out)[-1]["steps"] == 3


def test_a_tuned_dense_model_keeps_its_story_when_it_is_upcycled(arguments, tmp_path):
    tiny.save_text_parent(tmp_path / "llm", "llama")
    tiny.save_vision_parent(tmp_path / "vit", "siglip")
    for name in ("llm", "vit"):
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
    two = {"text_model": str(tmp_path / "llm"), "vision_model": str(tmp_path / "vit")}
    dense = upcycle(UpcycleArguments(**two, output_dir=str(tmp_path / "dense"), dense=True))
    tuned = finetune(arguments(method="align", model=str(dense)))
    sparse = upcycle(UpcycleArguments(vlm_model=str(tuned), output_dir=str(tmp_path / "sparse"), text_experts=4))
    assert history(sparse) == history(tuned)
    vlm = json.loads((sparse / "upcycle_receipt.json").read_text())["parents"]["vlm"]
    assert [one["name"] for one in vlm["parents"].values()] == ["llm", "vit"]
    card = ModelCard.load(sparse / "README.md")
    assert card.data.license == "mit"
    assert "| of this: LLM | llm (not on the Hub) |" in card.text
    assert "1. `align` of dense (not on the Hub)" in card.text


def test_settings_are_told_without_what_is_of_the_machine():
    told = describe_settings(
        {"method": "align", "model": "c/up", "data": "/home/me/rows.jsonl", "output_dir": "/home/me/out"}
        | {"lora_r": 16, "learning_rate": 0.001, "chat": "/home/me/chat.jinja", "train_routers": True}
    )
    assert told["model"] == {"name": "c/up", "hub_id": "c/up", "revision": None}
    assert told["data"] == {"name": "rows.jsonl", "hub_id": None}
    assert told["settings"] == {"learning_rate": 0.001}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data_format": "auto", "streaming": False, "shuffle_buffer": 1000}, {}),
        ({"data_format": "llava", "image_folder": "pictures"}, {"data_format": "llava"}),
        ({"streaming": True, "shuffle_buffer": 3}, {"streaming": True, "shuffle_buffer": 3}),
    ],
)
def test_how_the_data_were_read_is_told(given, told):
    assert describe_settings({"method": "align", "data": "rows.jsonl", **given})["settings"] == told


def test_rows_that_are_drawn_are_no_rows_of_the_data():
    base = SimpleNamespace(config=SimpleNamespace(), companions={})
    given = {"method": "align", "data": ["a.jsonl", "b.jsonl"]}
    drawn = describe_run({**given, "data_weights": [1.0, 3.0]}, base, 13)
    assert (drawn["data"]["draws"], drawn["data"].get("rows")) == (13, None)
    assert "data a.jsonl + b.jsonl (13 draws in a pass)" in told_on_the_card(drawn, 1)
    assert describe_run(given, base, 12)["data"]["rows"] == 12


def test_a_resumed_run_does_not_keep_the_old_accuracy(started, arguments):
    given = {"method": "align", "model": str(started), "lr_scheduler_type": "constant"}
    out = finetune(arguments(**given, save_steps=1))
    write_evaluation(out, share(16, 20))
    (out / "eval_results.json").write_text('{"eval_loss": 1.5}')
    write_card(out)
    assert "0.800" in (out / "README.md").read_text()
    finetune(arguments(**given, max_steps=3, resume_from_checkpoint="true"))
    text = (out / "README.md").read_text()
    assert not (out / "evaluation.json").exists()
    assert "Not measured: there is no `evaluation.json`.\n" in text


@pytest.mark.parametrize(("name", "value"), [("training_history.json", {}), ("upcycle_receipt.json", [])])
def test_raises_when_the_models_story_is_broken_before_training(started, arguments, tmp_path, name, value):
    (started / name).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=rf"{name} of the model .* is not as it should be.* Mend or remove it"):
        finetune(arguments(method="align", model=str(started)))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_an_adapter_merged_by_peft_alone_is_not_taken_for_its_model(started, arguments, tmp_path):
    (started / "README.md").unlink()
    aligned = finetune(arguments(method="align", model=str(started), output_dir=str(tmp_path / "aligned")))
    tuned = finetune(arguments(model=str(aligned), output_dir=str(tmp_path / "tuned")))
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(aligned), str(tuned))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert [run["method"] for run in history(tmp_path / "merged")] == ["align"]
    assert "The weights are not those that the last of these trainings wrote" in text
