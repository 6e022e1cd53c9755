"""`lr_reset: false`: two stages have the learning rates of one."""

import json

import pytest
import yaml

from modeling_vlmoe.finetune.chain.run import run_chain
from tests.finetune.chain import chains
from tests.slow import often


def rates(*folders):
    found = []
    for folder in folders:
        (state,) = folder.glob("checkpoint-*/trainer_state.json")
        found += [entry["learning_rate"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    return found


def chain(base, data, folder, stages, **shared):
    recipe = folder / "mine.yaml"
    own = {"lr_scheduler_type": "cosine", "warmup_steps": 0.2, "save_steps": 100, "lora_r": None}
    shared = chains.SHARED | own | shared
    recipe.write_text(yaml.safe_dump(shared | {"stages": stages}, sort_keys=False))
    return chains.parsed(recipe, [f"model={base}", f"data={data}", f"output_dir={folder / 'out'}"])


@pytest.mark.parametrize("is_reset", often([False, True], False))
def test_two_stages_have_the_rates_of_one_unless_they_are_reset(is_reset, base, data, tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    align = {"method": "align"}
    stages = {"first": align | {"max_steps": 2}, "second": align | {"max_steps": 3, "lr_reset": is_reset}}
    run_chain(chain(base, data, tmp_path / "two", stages))
    run_chain(chain(base, data, tmp_path / "one", {"whole": align | {"max_steps": 5}}))
    found, wanted = rates(*sorted((tmp_path / "two" / "out").glob("*-*"))), rates(tmp_path / "one" / "out" / "1-whole")
    assert len(found) == len(wanted) == 5
    assert (found == pytest.approx(wanted)) != is_reset


def test_raises_when_the_schedule_is_no_function_of_the_step(base, data, tmp_path):
    stages = {"first": {"method": "align", "max_steps": 2}, "second": {"method": "align", "lr_reset": False}}
    asked = chain(
        base, data, tmp_path, stages, lr_scheduler_type="reduce_lr_on_plateau", warmup_steps=0, eval_strategy="epoch",
        eval_data=str(data),
    )  # fmt: skip
    with pytest.raises(ValueError, match="lr_reset=false needs a schedule that follows from the step alone"):
        run_chain(asked)
