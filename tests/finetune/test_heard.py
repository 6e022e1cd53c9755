"""Settings that say nothing to the method are refused where they were given, as are numbers that train nothing."""

import pytest
import yaml

from modeling_vlmoe.finetune.arguments import parse_recipe, parse_settings
from modeling_vlmoe.finetune.heard import check_heard
from modeling_vlmoe.finetune.recipes import shipped_recipes

GIVEN = ["model=m", "data=rows.jsonl", "output_dir=out"]
NUMBERS = {"model": "m", "data": "rows.jsonl", "output_dir": "out", "use_cpu": True, "report_to": "none"}


@pytest.mark.parametrize("word", ["lora_r=64", "train_routers=false", "merge=true", "lora_targets=experts"])
def test_raises_when_the_method_does_not_hear_a_setting(word):
    name = word.partition("=")[0]
    message = f"Recipe full gives {name}, which method full does not hear; leave it out, or choose method lora"
    with pytest.raises(ValueError, match=message):
        parse_recipe("full", [*GIVEN, "report_to=none", word])
    parse_recipe("lora", [*GIVEN, "report_to=none", word])


def test_raises_when_the_recipe_itself_gives_it():
    with pytest.raises(ValueError, match="Recipe mine gives lora_alpha, which method full does not hear"):
        check_heard({"method": "full", "lora_alpha": 4}, {}, "Recipe mine")


@pytest.mark.parametrize("method", ["align", "delta"])
def test_what_a_recipe_of_another_method_brings_along_is_no_error(method, tmp_path):
    args = parse_recipe("lora", [*GIVEN, "report_to=none", f"method={method}"])
    assert args.method == method
    path = tmp_path / "finetune_settings.yaml"
    path.write_text(yaml.safe_dump(args.settings()))
    assert parse_recipe(path).settings() == args.settings()


@pytest.mark.parametrize("name", shipped_recipes())
def test_resolved_settings_are_heard(name, tmp_path):
    settings = parse_recipe(name, [*GIVEN, "report_to=none"]).settings()
    path = tmp_path / "finetune_settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert parse_recipe(path).settings() == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": 0}, "max_steps is 0; expected 1 or more, or leave it out"),
        ({"max_steps": -3}, "max_steps is -3; expected 1 or more"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0.0; expected more than 0, or give max_steps"),
        ({"num_train_epochs": "nan"}, "num_train_epochs is nan; expected more than 0"),
        ({"learning_rate": "nan"}, "learning_rate is nan; expected a number of 0 or more"),
        ({"learning_rate": "inf"}, "learning_rate is inf; expected a number of 0 or more"),
        ({"learning_rate": -1}, "learning_rate is -1.0; expected a number of 0 or more"),
        ({"weight_decay": "nan"}, "weight_decay is nan; expected a number of 0 or more"),
        ({"schedule_start": 2}, "schedule_start is 2, but schedule_steps is None; give schedule_steps"),
        ({"schedule_start": 9, "schedule_steps": 9}, "schedule_start is 9, but schedule_steps is 9"),
    ],
)
def test_raises_when_a_number_trains_nothing(given, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(NUMBERS | given)
