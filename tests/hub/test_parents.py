"""Parents from the Hub: the receipt and the card name their ids, the commits that were read, and their licences."""

import json

import pytest
from huggingface_hub import ModelCard

from tests import tiny

MADE = ["upcycle", "--text-model", "bob/llm", "--vision-model", "carol/vit", "--text-experts", "4", "--output-dir"]


@pytest.fixture
def parents(hub, tmp_path):
    """Two parents on the Hub; the ViT's licence is stated on another branch only. Returns their commits."""
    tiny.save_text_parent(tmp_path / "llm", "llama")
    tiny.save_vision_parent(tmp_path / "vit", "siglip")
    commits = {}
    for name, repo, card in (
        ("llm", "bob/llm", b"---\nlicense: gemma\n---\n"),
        ("vit", "carol/vit", b"# No licence\n"),
    ):
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        commits[name] = hub.write(repo, files | {"README.md": card})
    stated = hub.files("carol/vit") | {"README.md": b"---\nlicense: gemma\n---\n"}
    commits["stated"] = hub.repos["carol/vit"].commit("stated", stated, "a licence")
    return commits


def read(folder):
    return json.loads((folder / "upcycle_receipt.json").read_text())["parents"], ModelCard.load(folder / "README.md")


def test_a_parent_without_a_licence_makes_it_unknown(hub, parents, vlmoe, tmp_path):
    vlmoe(*MADE, tmp_path / "out", env=hub.env(None))
    found, card = read(tmp_path / "out")
    assert found["text"]["license"] == {"license": "gemma"}
    assert found["vision"]["license"] is None
    assert [found[role]["revision"] for role in ("text", "vision")] == [parents["llm"], parents["vit"]]
    assert card.data.license == "unknown"
    assert card.data.base_model == ["bob/llm", "carol/vit"]
    assert card.data.base_model_relation == "merge"
    assert parents["llm"] in card.text


def test_the_licence_is_that_of_the_revision_that_is_converted(hub, parents, vlmoe, tmp_path):
    vlmoe(*MADE, tmp_path / "out", "--vision-revision", "stated", env=hub.env(None))
    found, card = read(tmp_path / "out")
    assert found["vision"]["revision"] == parents["stated"]
    assert card.data.license == "gemma"
    before = len(hub.requests)
    vlmoe(*MADE, tmp_path / "offline", env=hub.env(None) | {"HF_HUB_OFFLINE": "1"}, fails=True)  # main is in no cache
    again = [*MADE, tmp_path / "offline", "--vision-revision", "stated"]
    vlmoe(*again, env=hub.env(None) | {"HF_HUB_OFFLINE": "1"})
    assert read(tmp_path / "offline")[1].data.license == "gemma"
    assert len(hub.requests) == before


@pytest.mark.slow
def test_offline_a_card_that_was_never_fetched_leaves_the_licence_unknown(hub, parents, vlmoe, run_python, tmp_path):
    fetch = "from huggingface_hub import snapshot_download\nfor name in ('bob/llm', 'carol/vit'):\n"
    fetch += "    snapshot_download(name, allow_patterns=['*.json', '*.safetensors', '*.model', '*.txt', '*.jinja'])"
    run_python(fetch, hub.env(None))
    vlmoe(*MADE, tmp_path / "out", env=hub.env(None) | {"HF_HUB_OFFLINE": "1"})
    found, card = read(tmp_path / "out")
    assert found["text"]["license"] is None
    assert found["text"]["hub_id"] == "bob/llm"
    assert card.data.license == "unknown"
