"""A card says what the folder's files say, runs, and stays as a person has edited it."""

import logging
import os
import re
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from modeling_vlmoe.finetune.evaluation_file import write_evaluation
from modeling_vlmoe.model_cards import CardNotes, is_rendered, keep_edited_card, render_card, write_card, write_notes
from tests.hub_server import metadata_errors
from tests.model_cards.folders import licence, parent, put, receipt, share

PARENTS = {"text": parent("a/llm", licence("llama3")), "vision": parent("b/vit", licence("apache-2.0"))}


def test_a_card_tells_of_the_receipt(folder):
    put(folder, "upcycle_receipt.json", receipt(**PARENTS))
    text = render_card(folder)
    for said in (
        "Parameters: 123,456 in total, 78,901 active per token",
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
        "Not measured: there is no `evaluation.json`",
    ):
        assert said in text, said
    assert metadata_errors(text) == []


def test_what_is_not_known_is_said_to_be(folder):
    text = render_card(folder)
    card = ModelCard(text)
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    parts = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", card.text, flags=re.M | re.S))
    assert parts["Parents"].startswith("Not known")
    assert parts["Licence"].startswith("Unknown")
    assert parts["How it was made"].startswith("Not known")
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
