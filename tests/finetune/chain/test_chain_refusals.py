"""Whatever is wrong in a recipe of stages is named before the first stage runs."""

import pytest
import yaml

from modeling_vlmoe.finetune.chain.run import run_chain
from modeling_vlmoe.finetune.recipe_runs import run_recipe
from modeling_vlmoe.finetune.recipes import shipped_chains, shipped_recipes
from tests.finetune.chain import chains


def refused(tmp_path, parents, data, stages, *more):
    recipe = chains.write_recipe(tmp_path / "mine.yaml", stages)
    return chains.parsed(recipe, chains.words(parents, data, tmp_path / "out", *more))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe-tune.lerning_rate=1"], "Stage moe-tune of Recipe mine has unknown keys: lerning_rate. Did you mean 'l"),
        (["lerning_rate=1"], "Recipe mine has unknown keys: lerning_rate. Did you mean 'learning_rate'"),
        (
            ["upcycle.text_expert=4"],
            "Stage upcycle of Recipe mine has unknown keys: text_expert. Did you mean 'text_e",
        ),
        (["dense-tun.lora_r=2"], "has no stage dense_tun, .*Did you mean 'dense-tune'"),
        (["align.lora_r=0"], "Stage align of Recipe mine: lora_r is 0|lora_r is 0"),
        (["align.model=m"], "Stage align of Recipe mine sets model, which follows from the chain"),
        (["upcycle.vlm_model=m"], "Stage upcycle of Recipe mine sets vlm_model, which follows"),
        (["upcycle.output_dir=m"], "sets output_dir, which follows"),
        (["resume_from_checkpoint=true"], "sets resume_from_checkpoint, which follows"),
        (["upcycle.text_experts=many"], "text_experts is 'many'; expected int"),
        (["upcycle.text_layers=first"], "text_layers is 'first'; expected layers"),
        (["model=m"], "is given a model and text_model, vision_model; leave one of them out"),
        (["output_dir=null"], "does not say output_dir"),
        (["data=null"], "Stage align of Recipe mine does not say data"),
        (["force=perhaps"], "force is 'perhaps'; expected yes or no"),
        (["align.lr_reset=false"], "Stage align of Recipe mine says lr_reset: false, but no training comes before"),
        (["moe-tune.lr_reset=maybe"], "lr_reset is 'maybe'; expected true or false"),
        (["warmups.routers=3"], 'has no stage warmups, but a setting of that name; give it .*"warmups={routers: 3}"'),
        (
            ["compose.method=lora"],
            "Stage compose of Recipe mine converts and trains nothing, so it has no method; give",
        ),
        (["align.lora_alpha=3"], "Stage align of Recipe mine gives lora_alpha, which method align does not hear"),
        (["moe-tune.control=3"], "control is 3; expected a mapping of settings"),
        (["moe-tune.lr_reset=false", "moe-tune.warmups={routers: 1}"], "its warmups is .*, not None; give both"),
        (["moe-tune.lr_reset=false", "moe-tune.learning_rates={routers: 1}"], "its learning_rates is .*, not None"),
        (["moe-tune.lr_reset=false", "moe-tune.learning_rate=1"], "its learning_rate is 1.0, not 0.01; give both"),
        (["moe-tune.lr_reset=false", "moe-tune.max_steps=-1"], "whose length has to be known .*give both max_steps"),
    ],
)
def test_raises_when_a_word_is_wrong(words, message, tmp_path, parents, data):
    with pytest.raises(ValueError, match=message):
        refused(tmp_path, parents, data, None, *words)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is no list of stages"),
        ({"a b": {}}, "a stage is called 'a b'; expected a letter"),
        ({"align": 3}, "stage align is 3; expected a mapping"),
        ([{"name": "a"}, {"name": "a"}], "has the stages a more than once"),
        ({"compose": {"upcycle": 4}}, "upcycle is 4; expected a mapping"),
        ({"compose": {"upcycle": {}, "method": "align"}}, "converts, but sets method; put what"),
        ({"compose": {"upcycle": {}, "control": {"train": ["mlp"]}}}, "converts, but sets control; put what"),
        ({"a": {"upcycle": {}}, "b": {"method": "align"}}, "gives lora_r, which none of its stages hears"),
        ({"align": {"method": "align"}}, "is given text_model, vision_model, but its first stage trains; give model="),
    ],
)
def test_raises_when_the_stages_are_wrong(stages, message, tmp_path, parents, data):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(chains.SHARED | {"stages": stages}))
    with pytest.raises(ValueError, match=message):
        chains.parsed(recipe, chains.words(parents, data, tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe-tune.data=/nowhere/rows.jsonl"], "Stage moe-tune of .*Cannot load the data /nowhere"),
        (["upcycle.text_layers=0-9"], "Stage upcycle of .*layers"),
        (["upcycle.text_top_k=5"], "Stage upcycle of .*5"),
        (["upcycle.dense=true"], "--dense gives no part experts"),
        (["moe-tune.max_length=5"], "Stage moe-tune of .*beyond max_length 5"),
        (["moe-tune.lora_targets=attn"], "expected some of attention, experts, mlp"),
        (["moe-tune.method=full", "moe-tune.train=vision.experts"], "Stage moe-tune of .*vision.experts"),
        (["compose.text_experts=4", "compose.dense=false"], "upcycles a model that has experts already"),
        (["text_model=/nowhere"], "--text-model /nowhere"),
    ],
)
def test_raises_before_the_first_stage_when_a_later_one_could_not_run(words, message, tmp_path, parents, recipe, data):
    with pytest.raises(ValueError, match=message):
        run_chain(chains.parsed(recipe, chains.words(parents, data, tmp_path / "out", *words)))
    assert not (tmp_path / "out").exists()


def test_raises_when_stages_are_given_as_a_word():
    with pytest.raises(ValueError, match=r"stages is given on the command line, .*write them there, and give STAGE"):
        run_recipe("moe-llava", ["stages=3"])


def test_a_list_of_stages_is_a_mapping_of_them(tmp_path, parents, data):
    listed = [{"name": name} | values for name, values in chains.STAGES.items()]
    found = refused(tmp_path, parents, data, listed)
    assert found.stages == refused(tmp_path, parents, data, None).stages


def test_words_come_before_the_recipe(tmp_path, parents, data):
    chain = refused(tmp_path, parents, data, None, "learning_rate=0.5", "align.learning_rate=0.25", "seed=7")
    rates = {stage.name: stage.settings["learning_rate"] for stage in chain.stages if stage.upcycle is None}
    assert rates == {"align": 0.25, "dense-tune": 0.5, "moe-tune": 0.5}
    assert [stage.upcycle["seed"] for stage in chain.stages if stage.upcycle is not None] == [7, 7]


def test_shipped_chains_are_no_recipes_of_one_stage():
    assert set(shipped_chains()) == {"cumo", "moe-llava"}
    assert not set(shipped_chains()) & set(shipped_recipes())


def test_the_command_names_what_is_wrong(vlmoe_here, parents, data, tmp_path):
    done = vlmoe_here("finetune", "moe-llava", *chains.words(parents, data, tmp_path / "out"), "alig.lora_r=1")
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1].startswith("vlmoe: Recipe moe-llava has no stage alig, which alig.lora_r")
    )
    assert not (tmp_path / "out").exists()
