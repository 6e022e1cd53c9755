"""A recipe with its dense control: the same tokens, the difference with its spread, the card."""

import json
import shutil

import pytest
from transformers import AutoConfig

from modeling_vlmoe.finetune.chain import run as chain_run
from modeling_vlmoe.finetune.control.arms import build_pairs
from modeling_vlmoe.finetune.control.run import chain_of_one
from modeling_vlmoe.finetune.control.seen_batches import read_seen
from modeling_vlmoe.finetune.control.settings import ControlSettings, split_control
from modeling_vlmoe.finetune.recipe_runs import run_recipe
from tests.finetune.chain import chains
from tests.finetune.control.controls import ON, given


def test_the_control_sees_the_tokens_that_the_sparse_model_sees(controlled):
    out, _ = controlled
    sparse, control = read_seen(out / "3-moe-tune"), read_seen(out / "control/dense-42/1-moe-tune")
    assert sparse == control
    assert [one["step"] for one in sparse] == [0, 1, 2]
    assert len({one["digest"] for one in sparse}) > 1
    assert all(one["tokens"] > 0 for one in sparse)


def test_the_control_begins_with_the_dense_model_that_was_upcycled(controlled):
    out, _ = controlled
    record = chains.read(out / "control/dense-42")
    assert record["stages"][0]["inputs"]["model"] == chains.read(out)["stages"][0]["weights"]
    config = AutoConfig.from_pretrained(out / "control/dense-42/1-moe-tune")
    assert config.text_moe is None
    settings = record["stages"][0]["settings"]
    assert settings["train"] == ["model.language_model.layers.0.mlp.*", "model.language_model.layers.2.mlp.*"]
    assert settings["learning_rates"] == {"mlp": 1e-2}


def test_the_difference_is_said_and_written(controlled):
    out, said = controlled
    found = chains.read(out / "3-moe-tune", "control.json")
    nll = found["measures"]["answer_nll"]
    by_arm = {run["arm"]: run["answer_nll"] for run in found["runs"]}
    assert nll["difference"]["mean"] == pytest.approx(by_arm["sparse"] - by_arm["dense"])
    assert nll["difference"]["spread_over"] == "rows"
    assert f"answer_nll: sparse minus dense {nll['difference']['mean']:+.4f} ± " in said
    assert "same tokens, in the same order and schedule; steps: moe-tune 3" in said
    assert {"answer_nll", "soft_accuracy", "exact"} == set(found["measures"])
    assert found["stages"][0]["differs"]["train"]


def test_the_card_has_it_while_the_weights_are_those(controlled, tmp_path):
    from modeling_vlmoe.model_cards import render_card

    out, _ = controlled
    card = (out / "3-moe-tune" / "README.md").read_text()
    section = card.partition("### Beside the dense model")[2].partition("## Intended use")[0]
    assert "| answer_nll | 4 |" in section
    assert "over rows drawn again, of one seed (42)" in section
    assert '"train": ["model.language_model.layers.0.mlp.*"' in section
    shutil.copytree(out / "3-moe-tune", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    shutil.copy(out / "2-upcycle" / "model.safetensors", tmp_path / "other" / "model.safetensors")
    assert "Beside the dense model" not in render_card(tmp_path / "other")


def test_a_finished_control_is_kept(controlled, dense, recipe, data, monkeypatch):
    out, said = controlled
    monkeypatch.setattr(chain_run, "finetune", None)
    assert run_recipe(recipe, given(dense, data, out), ON) == said


@pytest.mark.slow
def test_two_seeds_give_the_spread(controlled, dense, recipe, data):
    """The first seed's runs are kept; the control under equal cost is told its own steps."""
    out, _ = controlled
    said = run_recipe(recipe, given(dense, data, out), ON | {"control_seeds": 2})
    found = chains.read(out / "3-moe-tune", "control.json")
    assert found["seeds"] == [42, 43]
    runs = {(run["arm"], run["seed"]): run["answer_nll"] for run in found["runs"]}
    gaps = [runs["sparse", seed] - runs["dense", seed] for seed in (42, 43)]
    mean, std = sum(gaps) / 2, abs(gaps[0] - gaps[1]) / 2**0.5
    difference = found["measures"]["answer_nll"]["difference"]
    assert (difference["mean"], difference["std"]) == (pytest.approx(mean), pytest.approx(std))
    assert f"{mean:+.4f} ± {std:.4f}" in said
    assert "Mean ± standard deviation over 2 seeds" in said
    assert read_seen(out / "3-moe-tune") != read_seen(out / "control/sparse-43/3-moe-tune")
    assert read_seen(out / "control/dense-43/1-moe-tune") == read_seen(out / "control/sparse-43/3-moe-tune")


@pytest.mark.slow
def test_equal_cost_gives_the_control_more_steps(dense, recipe, data, tmp_path):
    """Top-2 experts of the dense MLP's width cost about twice the MLP."""
    words = given(dense, data, tmp_path / "out", "moe-tune.max_steps=10", "moe-tune.train=all", "save_steps=100")
    words += ["moe-tune.learning_rates=null", "upcycle.text_layers=0-2"]
    said = run_recipe(recipe, words, ON | {"control_match": "flops", "control_task": "none"})
    (stage,) = chains.read(tmp_path / "out/3-moe-tune", "control.json")["stages"]
    ratio = stage["flops"]["sparse"] / stage["flops"]["dense"]
    assert 1 < ratio < 2
    assert stage["steps"] == {"sparse": 10, "dense": round(10 * ratio)}
    assert stage["steps"]["dense"] > 10
    assert "trained at equal cost" in said
    sparse = read_seen(tmp_path / "out/3-moe-tune")
    dense_seen = read_seen(tmp_path / "out/control/dense-42/1-moe-tune")
    assert dense_seen[:10] == sparse
    assert len(dense_seen) == stage["steps"]["dense"]


@pytest.mark.slow
def test_a_chain_from_parents_has_a_control_from_parents(parents, data, tmp_path):
    """A first stage that makes experts: the control's makes none, with the same connector."""
    stages = {"upcycle": {"upcycle": {"text_experts": 4}}, "tune": {"method": "lora", "lora_targets": ["experts"]}}
    recipe = chains.write_recipe(tmp_path / "mine.yaml", stages)
    words = chains.words(parents, data, tmp_path / "out", f"eval_data={data}")
    run_recipe(recipe, words, ON | {"control_task": "none"})
    folder = tmp_path / "out/control/dense-42"
    assert [entry["folder"] for entry in chains.read(folder)["stages"]] == ["1-upcycle", "2-tune"]
    assert chains.read(folder)["stages"][1]["settings"]["lora_targets"] == ["mlp"]
    from safetensors.torch import load_file

    own, its = (load_file(one / "1-upcycle/model.safetensors") for one in (tmp_path / "out", folder))
    connector = [name for name in own if ".connector." in name]
    assert connector
    assert all(own[name].equal(its[name]) for name in connector)


@pytest.mark.slow
def test_a_recipe_of_one_stage_has_a_control_from_a_dense_model(sparse, dense, data, tmp_path, vlmoe_here):
    """As a user types it."""
    out = tmp_path / "out"
    words = given(sparse, data, out, f"dense_model={dense}", "max_steps=2", "use_cpu=true", "report_to=none")
    done = vlmoe_here("finetune", "lora", *words, "train_connector=true", "--with-dense-control")
    assert done.returncode == 0, done.stderr
    assert "answer_nll: sparse minus dense" in done.stdout
    assert (out / "1-lora" / "adapter_model.safetensors").is_file()
    assert "### Beside the dense model" in (out / "1-lora" / "README.md").read_text()


def pairs(model, data, out, control=None, **values):
    settings = {
        "model": str(model),
        "data": str(data),
        "output_dir": str(out),
        "eval_data": str(data),
        "use_cpu": True,
    }
    settings |= {"report_to": "none"} | values
    chain = chain_of_one("lora", {key: value for key, value in settings.items() if value is not None}, "Recipe lora")
    return build_pairs(chain, control or ControlSettings(with_dense_control=True))


@pytest.mark.parametrize(
    ("values", "control", "message"),
    [
        ({"eval_data": None}, {}, "nothing to evaluate on, so a control would .*give eval_data or eval_split"),
        ({}, {}, "The receipt of model .*sparse names text, vision, not where they are; give dense_model="),
        ({}, {"dense_model": "SPARSE"}, "has experts; give the dense model that the sparse one was made of"),
        ({"model": "DENSE"}, {}, "ends with a dense model, so there is no dense control"),
        ({"method": "full", "train": ["routers"]}, {"dense_model": "DENSE"}, "of which the dense model has nothing"),
    ],
)
def test_raises_when_there_is_no_control(values, control, message, sparse, dense, data, tmp_path):
    known = {"SPARSE": str(sparse), "DENSE": str(dense)}
    values, control = ({key: known.get(str(one), one) for key, one in each.items()} for each in (values, control))
    with pytest.raises(ValueError, match=message):
        pairs(values.pop("model", sparse), data, tmp_path / "out", ControlSettings(True, **control), **values)
    assert not (tmp_path / "out").exists()


def test_raises_when_the_model_was_trained_since(controlled, data, tmp_path):
    with pytest.raises(ValueError, match="was trained since it was upcycled, and its dense parents were not; give"):
        pairs(controlled[0] / "3-moe-tune", data, tmp_path / "out")


def test_raises_when_the_model_has_no_receipt(base, data, tmp_path):
    with pytest.raises(
        ValueError, match=r"has no upcycle_receipt.json that names its dense parents; give dense_model="
    ):
        pairs(base, data, tmp_path / "out")


def test_a_receipt_with_hub_ids_leads_to_the_parents(sparse, parents, data, tmp_path, monkeypatch):
    shutil.copytree(sparse, tmp_path / "model")
    path = tmp_path / "model" / "upcycle_receipt.json"
    receipt = json.loads(path.read_text())
    for role, folder in zip(("text", "vision"), parents, strict=True):
        receipt["parents"][role]["hub_id"] = str(folder)  # what the Hub would be asked for
    path.write_text(json.dumps(receipt))
    (pair,) = pairs(tmp_path / "model", data, tmp_path / "out")
    assert [stage.name for stage in pair.dense.stages] == ["dense-start", "lora"]
    args = pair.dense.upcycling(pair.dense.stages[0])
    assert (args.text_model, args.vision_model) == tuple(map(str, parents))
    assert (args.dense, args.seed, args.dtype) == (True, receipt["seed"], "float32")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"control_match": "steps"}, "control_match is 'steps'; expected one of tokens, flops"),
        ({"control_task": "vqas"}, "control_task is 'vqas'; .*Did you mean 'vqa'"),
        ({"control_seeds": 0}, "control_seeds is 0; expected 1 or more"),
        ({"control_seeds": [1, 1]}, "expected how many, or a list of different seeds"),
        ({"control_seeds": "two"}, "control_seeds is 'two'; expected how many"),
        ({"with_dense_control": "maybe"}, "expected true or false"),
        ({"with_dense_control": False, "dense_model": "m"}, "dense_model is given, but no control is trained; add"),
    ],
)
def test_raises_when_a_setting_of_the_control_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        split_control(ON | values)


def test_seeds_are_counted_from_the_recipes_own():
    assert ControlSettings(True, control_seeds=3).seeds(42) == [42, 43, 44]
    assert ControlSettings(True, control_seeds=[5, 1]).seeds(42) == [5, 1]
