"""A chain over tiny parents: made dense, aligned, tuned, upcycled and tuned again, seconds in all."""

import json
import re
from pathlib import Path

import yaml
from safetensors.torch import load_file

from modeling_vlmoe.finetune.arguments import read_overrides, read_recipe
from modeling_vlmoe.finetune.chain.recipe import parse_chain

STAGES = {
    "compose": {"upcycle": {"dense": True}},
    "align": {"method": "align", "learning_rate": 1e-2},
    "dense-tune": {"method": "lora", "lora_targets": ["attention", "mlp"], "train_connector": True},
    "upcycle": {"upcycle": {"text_experts": 4, "text_layers": "0,2"}},
    "moe-tune": {"method": "lora", "lora_targets": ["experts"]},
}
SHARED = {
    "max_steps": 3,
    "save_steps": 1,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lora_r": 2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
WORDS = ["text_model={text}", "vision_model={vision}", "data={data}", "output_dir={out}"]


def write_recipe(path: Path, stages=None, **shared) -> Path:
    path.write_text(yaml.safe_dump({**SHARED, **shared, "stages": stages or STAGES}, sort_keys=False))
    return path


def words(parents, data, out, *more):
    """What a user gives on the command line."""
    text, vision = parents
    return [word.format(text=text, vision=vision, data=data, out=out) for word in WORDS] + list(more)


def parsed(recipe, given):
    return parse_chain(read_recipe(recipe), read_overrides(given), f"Recipe {Path(recipe).stem}")


def read(folder: Path, name="chain.json"):
    return json.loads((folder / name).read_text())


# What a stage leaves that tells of its model, and not of when it ran or from which checkpoint it went on.
TOLD = ("training_history.json", "upcycle_receipt.json", "README.md", "config.json", "adapter_config.json")


def told(path: Path, out: Path) -> str:
    """A file's text, without the folder, which an adapter's names; PEFT's sets have another order in each process."""
    text = re.sub(rf'[^"]*/{out.name}/', "OUT/", path.read_text())
    if path.name != "adapter_config.json":
        return text
    values = {name: sorted(value) if isinstance(value, list) else value for name, value in json.loads(text).items()}
    return json.dumps(values, sort_keys=True)


def results(out: Path):
    """Every weight and every file that tells of a model, of all stages; and the record."""
    found = {"chain.json": (out / "chain.json").read_text()}
    for folder in sorted({path.parent for path in out.glob("[0-9]-*/**/*.safetensors")}):
        if "checkpoint-" in str(folder.relative_to(out)):
            continue
        for path in sorted(folder.glob("*.safetensors")):
            found[str(path.relative_to(out))] = load_file(path)
        for name in TOLD:
            if (folder / name).is_file():
                found[str((folder / name).relative_to(out))] = told(folder / name, out)
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, str):
            assert found[name] == value, name
            continue
        assert found[name].keys() == value.keys(), name
        for tensor in value:
            assert found[name][tensor].equal(value[tensor]), (name, tensor)
