"""Dense parents, a recipe of stages over them, and what an uninterrupted run of it comes to."""

import pytest

from modeling_vlmoe.finetune.chain.run import run_chain
from tests import tiny
from tests.finetune.chain import chains


@pytest.fixture(scope="session")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    text = tiny.save_text_parent(folder / "text", "llama", num_hidden_layers=3)
    return text, tiny.save_vision_parent(folder / "vision", "siglip")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return chains.write_recipe(tmp_path_factory.mktemp("recipe") / "stages.yaml")


@pytest.fixture(scope="session")
def data(pictures):
    return pictures / "test.jsonl"


@pytest.fixture(scope="session")
def whole(parents, recipe, data, tmp_path_factory):
    """The folder of a chain that nobody interrupted, and what it said."""
    out, said = tmp_path_factory.mktemp("whole") / "out", []
    run_chain(chains.parsed(recipe, chains.words(parents, data, out)), said.append)
    return out, said
