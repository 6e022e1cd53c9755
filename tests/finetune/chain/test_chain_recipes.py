"""The shipped recipes of stages: each runs two steps per stage, and trains what its paper trains."""

import pytest
from transformers import AutoConfig

from modeling_vlmoe.finetune.recipe_runs import run_recipe
from tests.finetune.chain import chains

QUICK = ["max_steps=2", "use_cpu=true", "disable_tqdm=true", "report_to=none", "gradient_accumulation_steps=1"]
TRAINED = {
    "moe-llava": (["align", "full", "full"], {"text": [0, 2], "vision": None, "connector": None}),
    "cumo": (["align", "full", "full"], {"text": None, "vision": [1, 2], "connector": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_shipped_chain_runs_two_steps_per_stage(name, parents, data, tmp_path):
    out = tmp_path / "out"
    said = run_recipe(name, chains.words(parents, data, out, *QUICK))
    (stage,) = out.glob("5-*")
    assert said == f"{stage}: done; the stages before it are in {out / 'chain.json'}"
    methods, layers = TRAINED[name]
    runs = chains.read(stage, "training_history.json")
    assert [(run["method"], run["steps"]) for run in runs] == [(method, 2) for method in methods]
    config = AutoConfig.from_pretrained(stage)
    for part, wanted in layers.items():
        moe = config.moe(part)
        assert (moe is None) == (wanted is None), part
        assert wanted in (None, True) or moe.layers == wanted, part


def test_the_learning_rates_are_the_papers(parents, data, tmp_path):
    from modeling_vlmoe.finetune.recipes import shipped_chains

    rates = {}
    for name, path in shipped_chains().items():
        chain = chains.parsed(path, chains.words(parents, data, tmp_path / "out"))
        rates[name] = [chain.arguments(stage).learning_rate for stage in chain.stages if stage.upcycle is None]
    assert rates == {"moe-llava": [1e-3, 2e-5, 2e-5], "cumo": [1e-3, 2e-6, 4e-6]}
