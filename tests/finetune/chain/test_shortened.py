"""A recipe that ends before what is recorded loses nothing of it unless it is told so."""

import shutil

import pytest

from modeling_vlmoe.finetune.chain import run as chain_run
from modeling_vlmoe.finetune.chain.run import run_chain
from tests.finetune.chain import chains


@pytest.fixture
def shortened(whole, parents, data, tmp_path):
    """Parses the recipe without its last stage, for a copy of the finished chain."""
    shutil.copytree(whole[0], tmp_path / "out")
    stages = {name: values for name, values in chains.STAGES.items() if name != "moe-tune"}
    recipe = chains.write_recipe(tmp_path / "mine.yaml", stages)
    return lambda *more: chains.parsed(recipe, chains.words(parents, data, tmp_path / "out", *more))


def test_raises_when_a_finished_stage_is_not_in_the_recipe(shortened, tmp_path):
    before = chains.results(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds moe-tune too, behind upcycle, .*force=true removes"):
        run_chain(shortened())
    chains.assert_same(chains.results(tmp_path / "out"), before)


def test_force_removes_it_and_the_record_says_so(shortened, tmp_path, monkeypatch):
    monkeypatch.setattr(chain_run, "upcycle", None)
    assert run_chain(shortened("force=true")) == tmp_path / "out" / "4-upcycle"
    record = chains.read(tmp_path / "out")
    assert not (tmp_path / "out" / "5-moe-tune").exists()
    assert [entry["name"] for entry in record["stages"]] == ["compose", "align", "dense-tune", "upcycle"]
    assert record["result"] == "4-upcycle"
