"""Dense parents and data, as for chains; a chain with its control."""

import pytest

from modeling_vlmoe.finetune.recipe_runs import run_recipe
from tests.finetune.chain import chains
from tests.finetune.chain.conftest import data, parents
from tests.finetune.control.controls import ON, STAGES, dense_model, given

__all__ = ["data", "parents"]


@pytest.fixture(scope="session")
def dense(parents, tmp_path_factory):
    return dense_model(parents, tmp_path_factory.mktemp("made") / "dense")


@pytest.fixture(scope="session")
def sparse(parents, tmp_path_factory):
    return dense_model(parents, tmp_path_factory.mktemp("made") / "sparse", text_experts=4, text_layers="0,2")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    return chains.write_recipe(tmp_path_factory.mktemp("recipe") / "stages.yaml", STAGES, lora_r=None)


@pytest.fixture(scope="session")
def controlled(dense, recipe, data, tmp_path_factory):
    """A chain with its control under one seed; what it said at the end."""
    out = tmp_path_factory.mktemp("controlled") / "out"
    return out, run_recipe(recipe, given(dense, data, out), ON)
