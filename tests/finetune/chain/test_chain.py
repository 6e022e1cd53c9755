"""A chain runs its stages in order, each on what the one before wrote; run again it keeps what is finished."""

import json
import shutil

import pytest
from transformers import AutoConfig

from modeling_vlmoe.finetune.chain import run as chain_run
from modeling_vlmoe.finetune.chain.run import run_chain
from modeling_vlmoe.weight_fingerprint import fingerprint
from tests.finetune.chain import chains


@pytest.fixture
def copy(whole, tmp_path):
    """A finished chain that a test may change; its weights are those of the whole one, its folder another."""
    shutil.copytree(whole[0], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def chain(parents, recipe, data, copy):
    """Parses the recipe for the copied folder."""
    return lambda *more: chains.parsed(recipe, chains.words(parents, data, copy, *more))


def test_each_stage_begins_with_what_the_one_before_wrote(whole):
    out, _ = whole
    record = chains.read(out)
    assert [entry["folder"] for entry in record["stages"]] == [
        "1-compose",
        "2-align",
        "3-dense-tune",
        "4-upcycle",
        "5-moe-tune",
    ]
    assert all(entry["state"] == "finished" for entry in record["stages"])
    for before, entry in zip(record["stages"], record["stages"][1:], strict=False):
        assert before["weights"] in entry["inputs"].values()
        assert fingerprint(out / before["result"]) == before["weights"]
    assert record["stages"][2]["result"] == "3-dense-tune/merged"
    assert record["result"] == "5-moe-tune"


def test_the_result_tells_of_every_stage(whole):
    out, _ = whole
    history = chains.read(out / "5-moe-tune", "training_history.json")
    assert [run["method"] for run in history] == ["align", "lora", "lora"]
    assert AutoConfig.from_pretrained(out / "4-upcycle").text_moe.layers == [0, 2]
    receipt = chains.read(out / "5-moe-tune", "upcycle_receipt.json")
    assert set(receipt["parents"]["vlm"]["parents"]) == {"text", "vision"}


def test_a_finished_chain_is_kept(chain, copy, monkeypatch):
    before = chains.results(copy)
    monkeypatch.setattr(chain_run, "finetune", None)
    said = []
    assert run_chain(chain(), said.append) == copy / "5-moe-tune"
    assert said == [
        f"finished already, by {copy / 'chain.json'}: compose, align, dense-tune, upcycle, moe-tune",
    ]
    chains.assert_same(chains.results(copy), before)


def test_raises_when_a_finished_stage_is_told_otherwise(chain, copy):
    before = chains.results(copy)
    with pytest.raises(ValueError, match=r"Stage dense-tune has finished in .*learning_rate was 0.01 and is 0.001"):
        run_chain(chain("dense_tune.learning_rate=0.001"))
    chains.assert_same(chains.results(copy), before)


def test_settings_of_the_machine_may_differ(chain, copy, monkeypatch):
    monkeypatch.setattr(chain_run, "finetune", None)
    assert run_chain(chain("logging_steps=7", "save_steps=2", "align.disable_tqdm=false")) == copy / "5-moe-tune"


def test_force_runs_the_first_stage_that_differs_and_all_behind_it(chain, copy, whole):
    said = []
    run_chain(chain("moe-tune.learning_rate=0.001", "force=true"), said.append)
    assert said[0].endswith("compose, align, dense-tune, upcycle")
    kept, wanted = chains.results(copy), chains.results(whole[0])
    changed = kept["5-moe-tune/adapter_model.safetensors"]
    assert any(not value.equal(wanted["5-moe-tune/adapter_model.safetensors"][key]) for key, value in changed.items())
    assert chains.read(copy)["stages"][4]["settings"]["learning_rate"] == 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: shutil.rmtree(out / "2-align"), "its result .*2-align was removed since"),
        (
            lambda out: shutil.copy(out / "1-compose/model.safetensors", out / "2-align/model.safetensors"),
            "its result .*2-align was changed since",
        ),
        (
            lambda out: (out / "2-align/model.safetensors").write_bytes(b"half"),
            "its result .*2-align was damaged since",
        ),
        (lambda out: (out / "chain.json").write_text("{"), "chain.json is not as a chain writes it"),
        (lambda out: (out / "chain.json").unlink(), "no chain.json: no chain was run there. Name another folder"),
    ],
)
def test_raises_when_what_is_finished_was_changed(chain, copy, change, message):
    change(copy)
    with pytest.raises(ValueError, match=message):
        run_chain(chain())


def test_a_half_written_stage_never_counts_as_finished(chain, copy, whole):
    """Killed behind the weights of a conversion, whose record was never written."""
    record = chains.read(copy)
    record["stages"] = record["stages"][:4]
    record["stages"][3] |= {"state": "begun", "weights": None}
    record["result"] = None
    (copy / "chain.json").write_text(json.dumps(record))
    (copy / "4-upcycle" / "model.safetensors").write_bytes(b"half")
    (copy / ".4-upcycle.partial-1").mkdir()
    run_chain(chain())
    chains.assert_same(chains.results(copy), chains.results(whole[0]))
    assert not (copy / ".4-upcycle.partial-1").exists()
