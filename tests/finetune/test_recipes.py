"""Recipes: the shipped ones parse, YAML and flags say the same, and mistakes are named."""

import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from modeling_vlmoe.finetune import FinetuneArguments, parse_recipe
from modeling_vlmoe.finetune.arguments import parse_settings
from modeling_vlmoe.finetune.checkpoints import write_settings
from modeling_vlmoe.finetune.recipes import shipped_recipes
from modeling_vlmoe.finetune.settings import METHODS, SETTINGS_NAME

NEEDED = ["model=m", "data=d.jsonl", "output_dir=o"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_parses(name):
    args = parse_recipe(name, NEEDED)
    assert args.method == name
    assert args.activation_checkpointing
    assert args.report_to == ["tensorboard"]


def test_shipped_recipes_are_one_for_each_method():
    assert set(shipped_recipes()) == set(METHODS)


def test_a_path_and_flags_give_the_same_as_yaml(tmp_path):
    values = {
        "method": "lora",
        "model": "m",
        "data": "d",
        "output_dir": "o",
        "lora_targets": ["experts"],
        "merge": True,
    }
    values |= {"learning_rate": "1e-4", "eval_steps": 5, "lr_scheduler_type": "cosine"}
    values |= {"lr_scheduler_kwargs": {"num_cycles": 2}}
    whole = tmp_path / "whole.yaml"
    whole.write_text(yaml.safe_dump(values))
    short = tmp_path / "short.yaml"
    short.write_text("method: align\nmerge: false\n")
    flags = [
        "method=lora",
        *NEEDED,
        "data=d",
        "lora_targets=experts",
        "merge=true",
        "learning_rate=1e-4",
        "eval-steps=5",
        "lr_scheduler_type=cosine",
    ]
    from_flags = parse_recipe(short, [*flags, "lr_scheduler_kwargs={num_cycles: 2}"])
    assert parse_recipe(whole).settings() == from_flags.settings()
    assert from_flags.learning_rate == 1e-4
    assert from_flags.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("reporter", ["none", "tensorboard"])
def test_resolved_settings_are_a_recipe_of_the_same_run(tmp_path, name, reporter):
    given = ["lora_dropout=0", "eval_strategy=no", "warmup_steps=3", f"report_to={reporter}"]
    given += ["lora_parts=text,vision"] if name == "lora" else []
    args = parse_recipe(name, [*NEEDED, *given, "lr_scheduler_kwargs={num_cycles: 2}"])
    write_settings(tmp_path, args)
    again = parse_recipe(tmp_path / SETTINGS_NAME)
    assert again.settings() == args.settings()
    assert again.report_to == args.report_to


@pytest.mark.parametrize("kind", ["linear", "constant_with_warmup", "inverse_sqrt", "cosine_with_restarts"])
def test_schedules_that_need_no_settings_are_taken(kind):
    assert parse_recipe("lora", [*NEEDED, f"lr_scheduler_type={kind}"]).lr_scheduler_type == kind


def test_every_field_has_help():
    assert not [item.name for item in fields(FinetuneArguments) if item.init and not item.metadata.get("help")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", "unknown keys: lerning_rate. Did you mean 'learning_rate'"),
        ("lora_rank=8", "unknown keys: lora_rank"),
        ("lora_r=many", "lora_r: invalid int value: 'many'"),
        ("lora_r=0", "lora_r is 0; expected 1 or more"),
        ("lora_dropout=1.5", "expected 0 or more, below 1"),
        ("lora_targets=attn", "expected some of attention, experts, mlp. Did you mean 'attention'"),
        ("lora_parts=connector", "expected some of text, vision"),
        ("method=ful", "method is 'ful'; expected one of align, lora, delta, full. Did you mean 'full'"),
        ("learning_rate={routers: 1}", "learning_rate: invalid float value"),
        ("learning_rates={rooters: 1}", "learning_rates names 'rooters'; expected some of .* Did you mean 'routers'"),
        ("learningrates={routers: 1}", "unknown keys: learningrates. Did you mean 'learning_rates'"),
        ("quantise_bits=4", "unknown keys: quantise_bits. Did you mean 'quantize_bits'"),
        ("dtype=float8", "dtype is 'float8'; expected one of auto, float32, bfloat16, float16. Did you mean"),
        ("max_length=0", "max_length is 0"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps is 0; expected 1 or more"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size is 0; expected 1 or more"),
        ("lr_scheduler_kwargs={a: 1}", "lr_scheduler_kwargs {'a': 1} do not fit lr_scheduler_type cosine: .*'a'"),
        ("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_kwargs None do not fit .*num_decay_steps"),
        ("push_to_hub=true", "Leave it out, and push the result: vlmoe push o --repo-id user/name"),
        ("remove_unused_columns=true", "the collator reads the columns"),
        ("merge", "not of the form key=value"),
        ("model=null", "does not say model"),
    ],
)
def test_raises_when_a_setting_is_wrong(override, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe("lora", [*NEEDED, override])


def test_raises_when_there_is_no_such_recipe(tmp_path):
    with pytest.raises(ValueError, match="no recipe lorra: expected a YAML file, or one of align, delta, full, lora"):
        parse_recipe("lorra", NEEDED)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_recipe(broken, NEEDED)
    broken.write_text("- a")
    with pytest.raises(ValueError, match="not a mapping"):
        parse_recipe(broken, NEEDED)


def test_yaml_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("lora_alfa: 3\n")
    with pytest.raises(ValueError, match=r"unknown keys: lora_alfa. Did you mean 'lora_alpha'"):
        parse_recipe(path, NEEDED)


def test_raises_when_tensorboard_is_missing(monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.finetune.arguments.is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match="tensorboard, which is not installed"):
        parse_settings({"model": "m", "data": "d", "output_dir": "o", "report_to": "tensorboard"})


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['vlmoe']; import modeling_vlmoe.finetune.command as c; c.settings_help()"
    code += "; assert not {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
