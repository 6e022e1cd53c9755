"""A card says what the folder's files say, runs, and stays as a person has edited it."""

import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEForSequenceClassification
from modeling_vlmoe.finetune.evaluation_file import write_evaluation
from modeling_vlmoe.model_cards import CardNotes, is_rendered, keep_edited_card, render_card, write_card, write_notes
from modeling_vlmoe.weight_fingerprint import count_parameters, fingerprint
from tests import models
from tests.hub_server import metadata_errors
from tests.model_cards.folders import licence, parent, put, receipt_of, share

PARENTS = {"text": parent("a/llm", licence("llama3")), "vision": parent("b/vit", licence("apache-2.0"))}


def test_a_card_tells_of_the_receipt(folder):
    put(folder, "upcycle_receipt.json", receipt_of(folder, **PARENTS))
    text = render_card(folder)
    for said in (
        f"Parameters: {count_parameters(folder):,} in total, 78,901 active per token",
        f"| LLM | [a/llm](https://huggingface.co/a/llm) | llama | `{'0' * 40}` | llama3 |",
        "The parents' licences differ, and both hold: a/llm: llama3; b/vit: apache-2.0",
        "- experts: LLM 4 experts in layers 0 to 2, top-2",
        "- experts: ViT dense",
        "expert init `copy`, router init `uniform`, seed 7",
        "largest gap to the parents 1.4e-06 standard deviations (limit 1.0e-05)",
        "- the ViT was rounded from float32 to bfloat16",
        "vlmoe 0.1.0, torch 2.13.0",
        "Its connector is drawn at random",
        "To be tuned",
        "None after the upcycling.",
        "Not measured: there is no `evaluation.json`",
    ):
        assert said in text, said
    assert metadata_errors(text) == []


def test_a_card_tells_how_the_model_routes(tmp_path):
    text = {"router_type": "sigmoid", "use_expert_bias": True, "router_logit_norm": 1.0, "norm_topk_prob": False}
    parts = {"text_moe": text, "vision_moe": {"router_type": "attention"}}
    models.sparse_model(**parts, connector_moe={"router_type": "expert_choice"}).save_pretrained(tmp_path)
    card = render_card(tmp_path)
    for said in (
        "scored by sigmoids, weights not renormalised, choices balanced by biases, router logits normalised",
        "routed by the text beside the image too",
        "experts choosing tokens",
        "Serving engines that encode images without text cannot run it.",
    ):
        assert said in card, said


def test_what_is_not_known_is_said_to_be(folder):
    text = render_card(folder)
    card = ModelCard(text)
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    parts = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", card.text, flags=re.M | re.S))
    assert parts["Parents"].startswith("Not known")
    assert parts["Licence"].startswith("Unknown")
    assert parts["How it was made"].startswith("Not known")
    assert parts["Training"].startswith("Not known")
    assert parts["Evaluation"].startswith("Not measured")
    assert parts["Bias"].startswith("Not measured")
    assert parts["Limits"].startswith("Not known")
    assert "active per token" in text
    assert "not known active per token" in text


def test_a_card_tells_of_the_training(folder):
    settings = {"learning_rate": 0.001, "seed": 0}
    runs = [
        {"method": "align", "model": {"name": "c/up", "hub_id": "c/up", "revision": "f" * 40}, "settings": settings}
        | {"data": {"name": "d/captions", "hub_id": "d/captions", "rows": 4800}, "steps": 150},
        {"method": "lora", "model": {"name": "aligned", "hub_id": None}, "settings": {"lora_r": 8}, "steps": None}
        | {"data": {"name": "train.jsonl", "hub_id": None, "rows": None}},
    ]
    put(folder, "training_history.json", runs)
    text = render_card(folder)
    assert (
        f"1. `align` of [c/up](https://huggingface.co/c/up) at `{'f' * 40}`: data "
        "[d/captions](https://huggingface.co/datasets/d/captions) (4800 rows), 150 steps. Settings: learning_rate "
        "0.001, seed 0." in text
    )
    assert "2. `lora` of aligned (not on the Hub): data train.jsonl (rows: not known), steps: not known." in text
    assert ModelCard(text).data.datasets == ["d/captions"]


def test_settings_alone_are_told_without_taking_paths_for_ids(folder):
    settings = "method: align\nmodel: out/up\ndata: data/rows.jsonl\nlearning_rate: 0.001\noutput_dir: out/aligned\n"
    (folder / "finetune_settings.yaml").write_text(settings)
    text = render_card(folder)
    assert "1. `align` of up (not on the Hub): data rows.jsonl (rows: not known), steps: not known." in text
    assert ModelCard(text).data.base_model is None
    assert ModelCard(text).data.datasets is None


def test_a_trainers_checkpoint_says_its_step(folder):
    put(folder, "trainer_state.json", {"global_step": 17})
    put(folder, "eval_results.json", {"eval_loss": 1.5})
    text = render_card(folder)
    assert "Not known: there is no `training_history.json`.\n\nThis is the trainer's checkpoint at step 17." in text
    assert "The loss on held-out rows was 1.5000." in text


def test_a_card_shows_the_accuracy_beside_its_controls(folder):
    kinds = {"colour": share(9, 10), "place": share(7, 10)}
    majority = share(8, 20, colour=share(4, 10), place=share(4, 10))
    controls = {"majority answer": majority, "LLM tuned blind": share(8, 20)}
    write_evaluation(
        folder, share(16, 20, **kinds) | {"predictions": ["x"] * 20}, controls, data="some/where/test.jsonl"
    )
    text = render_card(folder)
    assert "| **this model** | 0.800 [0.700 0.900] | 0.900 [0.800 1.000] | 0.700 [0.600 0.800] |" in text
    assert "| majority answer | 0.400 [0.300 0.500] | 0.400 [0.300 0.500] | 0.400 [0.300 0.500] |" in text
    assert "| LLM tuned blind | 0.400 [0.300 0.500] |  |  |" in text
    assert "| n | 20 | 10 | 10 |" in text
    assert "predictions" not in (folder / "evaluation.json").read_text()
    write_evaluation(folder, share(16, 20))
    assert "Controls (majority answer, shuffled images, text alone): not measured." in render_card(folder)


def test_notes_say_what_no_file_knows(folder):
    write_notes(folder, CardNotes(title="mine", intended_use="Counting sheep.", limits="Sheep only."))
    text = render_card(folder)
    assert "# mine\n" in text
    assert "## Intended use\n\nCounting sheep.\n" in text
    assert "## Limits\n\nSheep only.\n" in text


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ("limit: none", "has unknown keys: limit. Known: title, description"),
        ("limits: 3", "limits is no text"),
        ("- a", "is no mapping"),
        ("limits: [", "is not valid YAML"),
    ],
)
def test_raises_when_the_notes_are_wrong(folder, notes, message):
    (folder / "card_notes.yaml").write_text(notes)
    with pytest.raises(ValueError, match=message):
        render_card(folder)


def test_raises_when_there_is_no_model_of_ours(folder):
    put(folder, "config.json", {"model_type": "llama"})
    with pytest.raises(ValueError, match="holds no vlmoe model and no adapter"):
        render_card(folder)
    put(folder, "config.json", {"model_type": "vlmoe"})
    (folder / "upcycle_receipt.json").write_text("{")
    with pytest.raises(ValueError, match=r"upcycle_receipt.json is not valid JSON"):
        render_card(folder)


def test_the_quick_start_runs_as_it_is_printed(folder):
    write_card(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    stranger = code.replace("import modeling_vlmoe  # registers the architecture\n", "import sys\n", 1)
    stranger = stranger.replace("import sys\n", "import sys\nsys.modules['modeling_vlmoe'] = None\n", 1)
    stranger = stranger.replace("from_pretrained(name", "from_pretrained(name, trust_remote_code=True")
    beside = {"cwd": folder.parent, "env": os.environ, "capture_output": True, "text": True}
    for one in (code, stranger):
        done = subprocess.run([sys.executable, "-c", one], **beside)
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_rendered_card_is_known_by_its_mark(folder):
    assert write_card(folder)
    path = folder / "README.md"
    text = path.read_text()
    assert is_rendered(text)
    assert is_rendered(text.replace("\n", "\r\n"))
    assert not is_rendered(text.replace("## Limits", "## My limits"))
    assert not is_rendered(text + "more\n")
    assert not is_rendered("# mine")
    assert write_card(folder, name="another")
    assert "# another" in path.read_text()


def test_an_edited_card_stays_and_it_is_said(folder, caplog):
    write_card(folder)
    path = folder / "README.md"
    edited = path.read_text().replace("## Limits", "## My limits")
    path.write_text(edited)
    with caplog.at_level(logging.WARNING, logger="modeling_vlmoe"):
        assert not write_card(folder)
    assert "has been edited, and stays as it is" in caplog.text
    assert path.read_text() == edited
    with keep_edited_card(folder):
        path.write_text("what a library writes")
    assert path.read_text() == edited


def test_a_librarys_card_is_replaced(folder):
    with keep_edited_card(folder):
        (folder / "README.md").write_text("what a library writes")
    assert is_rendered((folder / "README.md").read_text())


def test_the_example_is_a_rendered_one():
    from modeling_vlmoe.model_cards.card import TEMPLATE

    text = TEMPLATE.with_name("vlmoe-demo.md").read_text()
    assert is_rendered(text)
    assert metadata_errors(text) == []
    assert re.findall(r"^## .*", text, flags=re.M) == re.findall(r"^## .*", TEMPLATE.read_text(), flags=re.M)


def test_a_classifiers_quick_start_runs_too(tmp_path, run_without_package):
    proc = models.processor()
    model = models.sparse_model(image_token_id=proc.image_token_id)
    classifier = VLMoEForSequenceClassification(model.config)
    classifier.save_pretrained(tmp_path / "model")
    proc.save_pretrained(tmp_path / "model")
    text = render_card(tmp_path / "model", repo_id=str(tmp_path / "model"))
    assert "A classifier of images and text with sparse Mixture-of-Experts layers" in text
    assert "pipeline_tag" not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert "generate" not in code
    code = code.replace("import modeling_vlmoe  # registers the architecture\n", "", 1)
    said = run_without_package(code.replace(".from_pretrained(name", ".from_pretrained(name, trust_remote_code=True"))
    assert said.startswith("LABEL_")


BROKEN = [
    ("upcycle_receipt.json", "[]", "all of it is [], expected a mapping"),
    ("upcycle_receipt.json", '{"parents": []}', "parents is [], expected a mapping"),
    ("upcycle_receipt.json", '{"settings": {}}', "settings.expert_init is null, expected str"),
    ("training_history.json", '{"a": 1}', "expected a list"),
    ("training_history.json", "[3]", "0 is 3, expected a mapping"),
    ("training_history.json", '[{"data": "x"}]', '0.data is "x", expected a mapping'),
    ("training_history.json", "[", "valid JSON"),
    ("evaluation.json", "{}", "n is null, expected int"),
    ("evaluation.json", '{"n": 1, "accuracy": 1, "interval": [0], "metric": "m"}', "expected a list of 2"),
    ("eval_results.json", '{"eval_loss": "low"}', "expected a number"),
    ("trainer_state.json", "[]", "expected a mapping"),
]


@pytest.mark.parametrize(("name", "text", "message"), BROKEN)
def test_raises_when_a_side_file_is_broken(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not .*{re.escape(message)}.*Mend or remove it"):
        render_card(folder)


def changed(folder, into, change):
    """The model, changed and saved elsewhere, with its processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    change(model)
    model.save_pretrained(into)
    return (into / "README.md").read_text()


def scale(model):
    with torch.no_grad():
        for parameter in model.model.connector.parameters():
            parameter.mul_(1.01)


@pytest.mark.parametrize(
    "change", [scale, lambda model: model.resize_token_embeddings(400)], ids=["trained", "resized"]
)
def test_a_rendered_card_is_not_carried_to_other_weights(folder, tmp_path, change):
    put(folder, "upcycle_receipt.json", receipt_of(folder, **PARENTS))
    write_evaluation(folder, share(16, 20))
    write_card(folder)
    assert "0.800 [0.700 0.900]" in (folder / "README.md").read_text()
    text = changed(folder, tmp_path / "changed", change)
    assert is_rendered(text)
    assert "The weights are not those that the upcycling wrote: they were changed afterwards" in text
    assert f"Parameters: {count_parameters(tmp_path / 'changed'):,} in total" in text
    for untrue in ("None after", "drawn at random", "To be tuned", "0.800"):
        assert untrue not in text, untrue
    assert changed(folder, tmp_path / "same", lambda model: None) == (folder / "README.md").read_text()
    (folder / "README.md").write_text("# Mine")
    assert changed(folder, tmp_path / "edited", change) == "# Mine"


def test_a_card_rendered_for_other_weights_is_left_out_without_the_package(folder, tmp_path, run_without_package):
    put(folder, "upcycle_receipt.json", receipt_of(folder, **PARENTS))
    write_card(folder)
    run_without_package(
        "import torch\nfrom transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"model.save_pretrained({str(tmp_path / 'same')!r})\n"
        "with torch.no_grad():\n    [one.mul_(1.01) for one in model.parameters()]\n"
        f"model.save_pretrained({str(tmp_path / 'changed')!r})\n"
    )
    assert (tmp_path / "same" / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert (tmp_path / "changed" / "upcycle_receipt.json").exists()
    assert not (tmp_path / "changed" / "README.md").exists()


def test_a_folder_saved_into_again_does_not_keep_its_rendered_card(folder):
    put(folder, "upcycle_receipt.json", receipt_of(folder, **PARENTS))
    write_card(folder)
    assert "they were changed afterwards" in changed(folder, folder, scale)


def test_an_unfit_side_file_does_not_keep_a_model_from_being_saved(folder, tmp_path, caplog):
    put(folder, "training_history.json", {})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    assert "No model card was written: " in caplog.text
    assert not (tmp_path / "saved" / "README.md").exists()


def test_an_evaluation_of_other_weights_is_not_shown(folder):
    write_evaluation(folder, share(16, 20))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert "0.800" in render_card(folder)
    scale(model)
    model.save_pretrained(folder)
    text = render_card(folder)
    assert "Not measured: `evaluation.json` does not say that it is about these weights." in text
    assert "0.800" not in text


def test_a_history_that_does_not_explain_the_weights_is_told_with_that(folder):
    run = {"method": "align", "model": {"name": "up"}, "data": {"name": "rows.jsonl"}, "steps": 3}
    put(folder, "training_history.json", [run | {"weights": fingerprint(folder)}])
    assert "changed" not in render_card(folder)
    put(folder, "training_history.json", [run | {"weights": "0" * 64}])
    text = render_card(folder)
    assert "1. `align` of up" in text
    assert "The weights are not those that the last of these trainings wrote" in text


STATED = {"name": "c/up", "hub_id": "c/up", "license": licence("mit")}


def test_a_licence_is_the_parents_only_where_it_is(folder):
    put(folder, "upcycle_receipt.json", receipt_of(folder, **PARENTS))
    put(folder, "training_history.json", [{"method": "align", "model": STATED}])
    said = (
        "mit, as the card of c/up states. The card of c/up states mit, but what it was made of is under "
        "llama3-and-apache-2.0. Find out which holds"
    )
    assert said in render_card(folder)
    put(folder, "upcycle_receipt.json", receipt_of(folder, text=parent("a/llm", licence("mit"))))
    assert "mit, as its parents." in render_card(folder)
    put(folder, "upcycle_receipt.json", receipt_of(folder, text=parent("a/llm")))
    assert "The card of c/up states mit, but what it was made of is under licences that are not all known." in (
        render_card(folder)
    )
    vlm = parent("d/dense", licence("mit"), parents=PARENTS)
    (folder / "training_history.json").unlink()
    put(folder, "upcycle_receipt.json", receipt_of(folder, vlm=vlm))
    assert "mit, as its parents' cards state. The card of d/dense states mit" in render_card(folder)
