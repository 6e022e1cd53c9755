"""What is advised is what the command takes: in a recipe of stages by the stage's name."""

import pytest

from modeling_vlmoe.finetune.watch.diagnosis import LOSS, Cause
from modeling_vlmoe.finetune.watch.remedies import remedies
from tests.finetune.chain import chains
from tests.finetune.chain.conftest import data, parents, recipe

__all__ = ["data", "parents", "recipe"]


def test_a_stage_is_told_by_its_name(recipe, parents, data, tmp_path):
    chain = chains.parsed(recipe, chains.words(parents, data, tmp_path / "out"))
    said = "\n".join(remedies(Cause(LOSS, "the loss"), chain.arguments(chain.stages[1]), 1e-2, 3))
    assert "try align.learning_rate=0.001 force=true" in said
    assert "align.warmup_steps=0.03 force=true" in said
    assert "align.max_grad_norm=0.1 force=true" in said


@pytest.mark.parametrize("is_half", [True, False])
def test_a_run_of_one_recipe_is_told_as_it_was_given(arguments, is_half):
    said = "\n".join(remedies(Cause(LOSS, "the loss", is_half=is_half), arguments(), 1e-2, 3))
    assert "try learning_rate=0.001)" in said
    assert ("dtype=bfloat16 or bf16=true" in said) == is_half
    assert "force" not in said
