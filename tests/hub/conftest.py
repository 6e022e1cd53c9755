"""A converted model and an adapter to push; the `vlmoe` command in a process of its own, and pushes from this one."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from modeling_vlmoe.push import push
from modeling_vlmoe.push_arguments import PushArguments
from tests import tiny
from tests.finetune.questions import question, write_rows
from tests.hub_server import TOKENS

VLMOE = "import sys; sys.argv[0] = 'vlmoe'; from modeling_vlmoe.cli import main; main()"


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A Llama + SigLIP model whose parents' licences differ, to be read only."""
    root = tmp_path_factory.mktemp("converted")
    tiny.save_text_parent(root / "llm", "llama")
    tiny.save_vision_parent(root / "vit", "siglip")
    (root / "llm" / "README.md").write_text("---\nlicense: llama3\n---\n")
    (root / "vit" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    settings = {"text_model": str(root / "llm"), "vision_model": str(root / "vit"), "output_dir": str(root / "made")}
    return upcycle(UpcycleArguments(**settings, text_experts=4, connector_experts=4))


@pytest.fixture
def made(converted, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(converted, tmp_path / "made"))


@pytest.fixture(scope="session")
def tuned(converted, tmp_path_factory):
    """An adapter of it as PEFT saves one, card included, with the processor; to be read only."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    model = AutoModelForImageTextToText.from_pretrained(converted)
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(folder)
    AutoProcessor.from_pretrained(converted).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(tuned, tmp_path):
    """A copy of the adapter, to be changed."""
    return Path(shutil.copytree(tuned, tmp_path / "adapter"))


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process is a client of the hub, with a cache of its own (what `hub.env()` is to another process)."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


@pytest.fixture
def push_here(online):
    """Pushes from this process, as alice unless told otherwise; returns what the command would print."""

    def run(folder, repo_id="alice/tiny", **given):
        return push(PushArguments(folder=str(folder), repo_id=repo_id, **({"token": TOKENS["alice"]} | given)))

    return run


@pytest.fixture
def vlmoe(run_python):
    """Runs the command; returns what it printed (`fails=True`: what it said on its way out)."""

    def run(*words, env=None, **kwargs):
        return run_python(VLMOE, env, arguments=words, **kwargs)

    return run


@pytest.fixture
def rows(tmp_path):
    """Four questions with pictures."""
    folder = tmp_path / "rows"
    (folder / "images").mkdir(parents=True)
    asked = []
    for name in ("red", "green", "blue", "white"):
        Image.new("RGB", (24, 24), name).save(folder / "images" / f"{name}.png")
        asked.append(question([f"images/{name}.png"], name))
    return write_rows(folder / "rows.jsonl", asked)
