"""A dense VLM made sparse in place is tuned, evaluated, merged, pushed and chatted with, by its own processor."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, is_torchvision_available

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.conversion.host_processor_classes import VIDEO
from modeling_vlmoe.conversion.host_processors import open_processor, processor_files
from modeling_vlmoe.finetune import evaluate_vqa, finetune, load_chat_data, load_finetuned
from modeling_vlmoe.finetune.adapters import whole_connector
from modeling_vlmoe.finetune.arguments import parse_settings
from modeling_vlmoe.push import push
from modeling_vlmoe.push_arguments import PushArguments
from tests import hosts
from tests.finetune.conftest import COLOURS
from tests.finetune.host_rows import template
from tests.finetune.questions import question, write_rows

FAMILIES = ["qwen2_5_vl", "smolvlm", "llava_next", "gemma3"]


@pytest.fixture(scope="session")
def sparse(tmp_path_factory):
    """A family's folder, sparse in place, written once, to be read only."""
    root, made = tmp_path_factory.mktemp("sparse"), {}

    def get(family):
        if family not in made:
            dense = hosts.save(root / family / "dense", family)
            (dense / "chat_template.jinja").write_text(template(family))
            given = {"vlm_model": str(dense), "output_dir": str(root / family / "sparse")}
            made[family] = upcycle(UpcycleArguments(**given, text_experts=4, vision_experts=3))
        return made[family]

    return get


def settings(folder, data, output_dir, **given):
    """Runs of a few steps, as the shipped recipes have them otherwise."""
    values = {
        "method": "lora",
        "model": str(folder),
        "data": str(data),
        "output_dir": str(output_dir),
        "max_steps": 2,
        "max_length": 512,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "activation_checkpointing": True,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return parse_settings(values | given)


@pytest.fixture(scope="session")
def tuned(sparse, pictures, tmp_path_factory):
    """A family's adapter, with the merged model in it, tuned once on rows of one, two and no pictures."""
    root, made = tmp_path_factory.mktemp("tuned"), {}

    def get(family):
        if family not in made:
            given = {"train_split": "train", "eval_split": "test", "train_connector": True, "merge": True}
            made[family] = finetune(settings(sparse(family), pictures, root / family, max_steps=8, **given))
        return made[family]

    return get


def load_processor(folder, family):
    """By the Auto class, where that can build it: Qwen's reads videos, for which transformers needs torchvision."""
    needs_torchvision = VIDEO in type(hosts.processor(family)).__mro__[1].get_attributes()
    if needs_torchvision and not is_torchvision_available():
        return open_processor(folder, family)
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_lower_the_loss(tuned, family):
    state = json.loads((tuned(family) / "checkpoint-8" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((tuned(family) / "eval_results.json").read_text())["eval_loss"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_answers_as_the_adapter_does(tuned, family, pictures):
    rows = load_chat_data(pictures, "train")
    merged = AutoModelForImageTextToText.from_pretrained(tuned(family) / "merged")
    made = load_processor(tuned(family) / "merged", family)
    adapted, other = load_finetuned(tuned(family))
    assert type(made).__name__ == type(other).__name__ == hosts.HOSTS[family].processor
    results = [
        evaluate_vqa(model, processor, rows, max_new_tokens=4)
        for model, processor in ((merged, made), (adapted, other))
    ]
    assert results[0]["predictions"] == results[1]["predictions"]
    assert set(results[0]["groups"]) == {"colour", "other", "pair", "text"}
    shuffled = evaluate_vqa(merged, made, load_chat_data(pictures, "test"), max_new_tokens=2, shuffle_images=True)
    assert shuffled["count"] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_goes_along(sparse, tuned, family):
    """Of a processor that cannot read all of its files here, the files as they were."""
    kept = {file.name: file.read_bytes() for file in processor_files(sparse(family))}
    for folder in (tuned(family), tuned(family) / "merged", tuned(family) / "checkpoint-8"):
        assert {file.name for file in processor_files(folder)} == set(kept)
        assert (folder / "chat_template.jinja").read_bytes() == kept["chat_template.jinja"]
        if family == "qwen2_5_vl" and not is_torchvision_available():
            assert all((folder / name).read_bytes() == data for name, data in kept.items())


def test_video_settings_go_along(sparse, pictures, tmp_path):
    """They are not read here, and are there again for whoever reads them."""
    folder = tmp_path / "sparse"
    shutil.copytree(sparse("qwen2_5_vl"), folder)
    (folder / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    made = open_processor(folder, "qwen2_5_vl")
    made.save_pretrained(tmp_path / "saved")
    if not is_torchvision_available():
        assert {file.name for file in processor_files(tmp_path / "saved")} == {
            file.name for file in processor_files(folder)
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_cards_tell_of_it(sparse, tuned, family):
    card = (tuned(family) / "merged" / "README.md").read_text()
    assert f"| dense vision-language model | dense (not on the Hub) | {family} |" in card
    assert "1. `lora` of sparse (not on the Hub)" in card
    assert "A LoRA adapter (PEFT)" in (tuned(family) / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_can_be_chatted_with_and_pushed(tuned, family, pictures, vlmoe_here):
    words = ["max_new_tokens=4", "do_sample=false", "--image", str(pictures / "images" / "red.png")]
    folder = tuned(family) / "merged"
    done = vlmoe_here("chat", folder, *words, typed="which colour?\n")
    assert done.returncode == 0, done.stderr
    model, made = AutoModelForImageTextToText.from_pretrained(folder), open_processor(folder, family)
    wanted = evaluate_vqa(model, made, list(load_chat_data(pictures, "test"))[:1], max_new_tokens=4)["predictions"]
    assert done.stdout.strip() == wanted[0]
    for pushed, base in ((folder, None), (tuned(family), "user/base")):
        told = push(PushArguments(folder=str(pushed), repo_id="user/it", dry_run=True, base_model=base))
        assert "processor_config.json" in told
        assert ("modeling_in_place.py" in told) == (base is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_align_changes_the_connector_only(sparse, pictures, tmp_path, family):
    """Also one that is no MLP that is known, and so carries no experts."""
    out = finetune(settings(sparse(family), pictures / "test.jsonl", tmp_path / "out", method="align", lora_r=1))
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (sparse(family), out))
    path = whole_connector(before)
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(name.startswith(f"{path}.") for name in changed)


def test_raises_when_align_finds_no_connector(sparse):
    model = AutoModelForImageTextToText.from_pretrained(sparse("smolvlm"))
    del model.model.connector
    with pytest.raises(ValueError, match="SmolVLMForConditionalGeneration has nothing between its ViT and its LLM"):
        whole_connector(model)


def copied(folder, target, *without):
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize(
    ("without", "message"),
    [
        (PROCESSOR, "has no processor that can be loaded. Add or mend it"),
        (("chat_template.jinja",), "has no chat template, so conversations cannot be laid out. Put the model's"),
    ],
    ids=["processor", "template"],
)
def test_raises_before_the_weights_are_read_when_there_is_no(
    sparse, pictures, tmp_path, monkeypatch, vlmoe_here, family, without, message
):
    monkeypatch.setattr("modeling_vlmoe.finetune.train.load_base", None)
    folder = copied(sparse(family), tmp_path / "model", *without)
    with pytest.raises(ValueError, match=message):
        finetune(settings(folder, pictures / "test.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    done = vlmoe_here("chat", folder, typed="hello\n")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert message[:20] in done.stderr


def test_raises_when_the_processor_is_broken_or_anothers(sparse, pictures, tmp_path):
    folder = copied(sparse("smolvlm"), tmp_path / "model")
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"processor_config.json"):
        finetune(settings(folder, pictures / "test.jsonl", tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text()) | {"image_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_bytes((sparse("smolvlm") / "processor_config.json").read_bytes())
    with pytest.raises(ValueError, match=r"The processor's image token is \d+, but the model's image_token_id is 7"):
        finetune(settings(folder, pictures / "test.jsonl", tmp_path / "out"))


def test_raises_when_a_row_is_too_long_before_the_weights_are_read(sparse, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.finetune.train.load_base", None)
    rows = [question([], "red"), question([f"images/{name}.png" for name in COLOURS], "all")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"Row 2 of the data is \d+ tokens long \(4 images\), beyond max_length 60"):
        finetune(settings(sparse("smolvlm"), data, tmp_path / "out", max_length=60, image_folder=str(pictures)))
