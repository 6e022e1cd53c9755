"""Splits that cannot be made are refused before anything is read; launch configurations are accelerate's."""

from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

from modeling_vlmoe.finetune import finetune
from modeling_vlmoe.finetune.scale.configs import shipped_configs
from modeling_vlmoe.finetune.scale.sizes import check_scale, splitting
from tests import models

RUN = {
    "fsdp_size": 2,
    "ep_size": None,
    "world_size": 2,
    "method": "full",
    "save_strategy": "steps",
    "save_only_model": True,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
    "fsdp": None,
    "deepspeed_plugin": None,
    "quantize_bits": None,
    "auto_find_batch_size": False,
}


def config(**parts):
    return models.sparse_config(**parts)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fsdp_size": 0}, "fsdp_size is 0; expected 1 or more"),
        ({"ep_size": -1}, "ep_size is -1; expected 1 or more"),
        ({"fsdp_size": None, "ep_size": 2}, "ep_size is 2, but fsdp_size is not given; give fsdp_size=2"),
        ({"fsdp_size": 4, "world_size": 4, "ep_size": 3}, "ep_size is 3, which does not divide fsdp_size 4"),
        ({"world_size": 1}, "fsdp_size is 2, but there is 1 process; start as many: torchrun --nproc-per-node 2"),
        ({"world_size": 4}, "fsdp_size is 2, but there are 4 processes"),
        ({"resume_from_checkpoint": "true"}, "leave resume_from_checkpoint out"),
        ({"save_only_model": False}, "give save_only_model=true"),
        ({"load_best_model_at_end": True}, "leave load_best_model_at_end out"),
        ({"deepspeed_plugin": object()}, "leave it out under accelerate's FSDP or DeepSpeed"),
        ({"fsdp": "full_shard"}, "leave it out under accelerate's FSDP or DeepSpeed"),
        ({"quantize_bits": 4}, "leave quantize_bits out"),
        ({"auto_find_batch_size": True}, "leave auto_find_batch_size out"),
        ({"method": "lora", "ep_size": 2}, "leave ep_size out"),
        ({"fsdp_size": 8, "world_size": 8, "ep_size": 8}, "ep_size is 8, which does not divide the 4 experts"),
    ],
)
def test_raises_when_a_split_cannot_be(given, words):
    with pytest.raises(ValueError, match=words):
        check_scale(SimpleNamespace(**RUN | given), config())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"text_moe": None, "vision_moe": None}, "neither the LLM nor the ViT of this model has experts"),
        ({"text_moe": models.EXPERTS | {"expert_type": "delta", "expert_rank": 2}}, "vlmoe densify"),
    ],
)
def test_raises_when_the_experts_cannot_be_split(parts, words):
    with pytest.raises(ValueError, match=words):
        check_scale(SimpleNamespace(**RUN | {"ep_size": 2}), config(**parts))


def test_what_can_be_is_asked_of_transformers():
    args = SimpleNamespace(**RUN | {"ep_size": 2})
    check_scale(args, config())
    asked = splitting(args)["distributed_config"]
    assert (asked.fsdp_size, asked.ep_size) == (2, 2)
    assert splitting(SimpleNamespace(**RUN | {"method": "lora"})) == {}
    assert splitting(SimpleNamespace(**RUN | {"fsdp_size": None})) == {}


def test_a_run_on_one_process_is_refused_before_it_leaves_anything(arguments, tmp_path):
    with pytest.raises(ValueError, match="fsdp_size is 2, but there is 1 process"):
        finetune(arguments(fsdp_size=2, save_only_model=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_configuration_is_accelerates(name):
    path = shipped_configs()[name]
    settings = ClusterConfig.from_yaml_file(str(path))
    assert settings.num_processes == 2
    leaves = yaml.safe_load(path.read_text()).get("deepspeed_config", {}).get("deepspeed_moe_layer_cls_names")
    assert leaves == ("SparseMoE" if name == "zero3" else None)
    assert f"--config_file {name}.yaml -m modeling_vlmoe finetune" in path.read_text()


def test_configurations_are_listed_printed_and_written(vlmoe_here, tmp_path):
    listed = vlmoe_here("configs")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["ddp", "fsdp2", "fsdp_ep", "zero3"]
    assert "zero_stage: 3" in vlmoe_here("configs", "zero3").stdout
    assert vlmoe_here("configs", "--output-dir", tmp_path / "new").returncode == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(
        f"{one}.yaml" for one in shipped_configs()
    )


def test_raises_when_there_is_no_such_configuration(vlmoe_here, tmp_path):
    done = vlmoe_here("configs", "zero2")
    assert done.returncode == 2
    assert "NAME is 'zero2'; expected one of ddp, fsdp2, fsdp_ep, zero3. Did you mean 'zero3'" in done.stderr
    (tmp_path / "ddp.yaml").write_text("mine")
    done = vlmoe_here("configs", "ddp", "--output-dir", tmp_path)
    assert done.returncode == 2
    assert "has ddp.yaml already" in done.stderr
    assert (tmp_path / "ddp.yaml").read_text() == "mine"
