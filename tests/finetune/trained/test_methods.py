"""Methods `full` and `delta` as runs: what they change, what they leave, what is told of it; and their refusals."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.finetune import build_trainer, finetune, load_chat_data, load_finetuned
from modeling_vlmoe.finetune.settings import is_heard
from modeling_vlmoe.finetune.trained.methods import delta_names


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def changed(before, folder):
    after = weights(folder)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_delta_changes_what_experts_have_of_their_own_routers_and_connector(delta_base, arguments):
    said = []
    folder = finetune(
        arguments(method="delta", model=str(delta_base), max_steps=3, save_strategy="no"), say=said.append
    )
    model = AutoModelForImageTextToText.from_pretrained(delta_base)
    names = delta_names(model)
    found = changed(model.state_dict(), folder)
    assert found <= names
    assert names - found <= {name for name in names if name.endswith("_a")}  # their partners are zero at the start
    assert any(".deltas.down_proj_b" in name for name in found)
    assert any(".router." in name and "vision" in name for name in found)
    assert not [name for name in found if name.endswith(("experts.gate_up_proj", "experts.down_proj", "up_proj"))]
    assert all(".deltas." in name or ".router." in name for name in names)
    counts = next(one for one in said if one.startswith("Trained, by part:"))
    assert {line.split()[0] for line in counts.splitlines()[1:] if line.split()[1] != "0"} == {
        *("experts", "routers", "vision.experts", "vision.routers", "connector.experts", "connector.routers", "all")
    }


def test_a_run_tells_what_it_has_trained(base, arguments, caplog):
    said = []
    given = {"method": "full", "train": ["routers", "connector"], "learning_rates": {"connector": 1e-3}}
    with caplog.at_level("INFO", logger="modeling_vlmoe.finetune.train"):
        folder = finetune(arguments(**given), say=said.append)
    counts = said[1]
    assert counts in caplog.text
    assert ["routers", "384", "of", "384"] in [line.split() for line in counts.splitlines()]
    for place in (folder, folder / "checkpoint-2"):
        (run,) = json.loads((place / "training_history.json").read_text())
        assert run["method"] == "full"
        assert run["settings"]["train"] == ["routers", "connector"]
        assert run["settings"]["learning_rates"] == {"connector": 1e-3}
        assert not [
            name
            for name in run["settings"]
            if name.startswith(("lora_", "train_r", "train_c", "quantize_", "warmups"))
        ]
        assert run["trained"]["routers"] == {"trained": 384, "of": 384}
        assert run["trained"]["experts"]["trained"] == 0
        card = (place / "README.md").read_text()
        assert "Trained parameters: " in card
        assert "routers 384 of 384" in card
    found = changed(weights(base), folder)
    assert found
    assert all(".connector." in name or ("language_model" in name and ".router." in name) for name in found)
    model, _ = load_finetuned(folder)  # a full checkpoint
    assert not hasattr(model, "peft_config")


@pytest.mark.slow
def test_a_dense_model_is_trained_whole(dense_base, arguments):
    folder = finetune(arguments(method="full", model=str(dense_base), save_strategy="no"))
    found = changed(weights(dense_base), folder)
    assert any(".mlp." in name and "language_model" in name for name in found)
    assert any("vision_tower" in name for name in found)


def test_raises_when_delta_is_asked_of_a_model_without_delta_experts(
    arguments, dense_base, model, processor, pictures
):
    with pytest.raises(ValueError, match=r"its experts are whole. Make some: vlmoe upcycle ... --expert-init delta"):
        finetune(arguments(method="delta"))
    with pytest.raises(ValueError, match="but the model has none: it is dense"):
        finetune(arguments(method="delta", model=str(dense_base)))
    with pytest.raises(ValueError, match="its experts are whole"):
        build_trainer(model, processor, load_chat_data(pictures, "test"), arguments(method="delta"))
    assert not arguments().folder.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "full", "train": ["model.vision_tower.*"]}, "would stay frozen"),
        ({"method": "lora", "train": ["experts"]}, "which gets LoRA"),
        ({"method": "lora", "learning_rates": {"vision": 1.0}}, "learning_rates names vision, but it is not trained"),
    ],
    ids=["pattern", "adapted", "rate"],
)
def test_raises_before_the_weights_are_read_and_leaves_no_folder(given, message, arguments, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.finetune.train.load_base", None)
    with pytest.raises(ValueError, match=message):
        finetune(arguments(**given))
    assert not arguments().folder.exists()


def test_raises_when_text_alone_has_nothing_to_learn_from(arguments, pictures):
    with pytest.raises(ValueError, match="Row 8 of the data has no image, but method align, or a train that leaves"):
        finetune(arguments(method="full", train=["connector", "vision"], data=str(pictures)))


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("lora_r", {"lora"}),
        ("train_routers", {"lora"}),
        ("quantize_bits", {"lora"}),
        ("train", {"lora", "full"}),
        ("train_split", {"align", "lora", "delta", "full"}),
        ("learning_rates", {"align", "lora", "delta", "full"}),
    ],
)
def test_settings_are_told_of_the_methods_that_hear_them(name, methods):
    assert {method for method in ("align", "lora", "delta", "full") if is_heard(name, method)} == methods
