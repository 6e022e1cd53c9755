"""A converted model to push, and the `vlmoe` command in a process of its own."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from tests import tiny
from tests.finetune.questions import question, write_rows

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
