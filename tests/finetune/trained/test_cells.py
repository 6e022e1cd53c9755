"""Every parameter is of exactly one part, whatever the towers; and what no gradient reaches is known."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEConfig
from modeling_vlmoe.conversion.host_parents import host_values
from modeling_vlmoe.finetune import prepare_model
from modeling_vlmoe.finetune.settings import FinetuneSettings
from modeling_vlmoe.finetune.trained.adapted_names import bare_name, cells_by_path
from modeling_vlmoe.finetune.trained.cells import parameter_cells
from modeling_vlmoe.finetune.trained.names import CELLS, KINDS, NAMES, PRESETS, cells_of, most_exact, tower_of
from modeling_vlmoe.finetune.trained.reach import idle_parameters
from tests import hosts, models, tiny
from tests.slow import often

EXPERTS = {"text_moe": models.EXPERTS, "vision_moe": models.EXPERTS}
# What parameters are called in the tiny towers, and the kinds that these names say.
SAYS = (
    (r"\.experts\.", "experts"),
    (r"\.router\.", "routers"),
    (r"\.shared_expert", "shared"),
    (r"norm\d?\.|layrnorm|\.ln_", "norms"),
    (r"attn\.|attention\.", "attention"),
    (r"\.mlp\.|\.feed_forward\.|linear_\d", "mlp"),
    (r"embed|image_newline|patch_conv", "embeddings"),
    (r"lm_head", "head"),
)


def host_model(family, **moes):
    config = VLMoEConfig.from_dict(host_values(hosts.config(family)) | (moes or EXPERTS))
    return tiny.redraw(AutoModelForImageTextToText.from_config(config))


def without_gradient(model, inputs):
    """The oracle: the parameters that a real step gives no gradient."""
    model.train().requires_grad_(True)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def check_total(model):
    cells = parameter_cells(model)
    assert list(cells) == [name for name, _ in model.named_parameters()]
    assert set(cells.values()) <= set(CELLS)
    return cells


@pytest.mark.parametrize(("text", "vision"), models.PAIRS)
def test_every_parameter_of_our_composite_is_of_the_part_that_its_name_says(text, vision):
    model = models.sparse_model(text, vision, text_moe=models.EXPERTS | {"num_shared_experts": 1})
    for name, cell in check_total(model).items():
        tower = "vision" if ".vision_tower." in name else "connector" if ".connector." in name else "text"
        assert tower_of(cell) == tower, name
        if ".vision_tower.head." in name:
            assert cell == "vision.head"
            continue
        said = next(kind for pattern, kind in SAYS if re.search(pattern, name))
        assert cell.rpartition(".")[2] == said, name


@pytest.mark.parametrize("family", hosts.HOSTS)
def test_every_parameter_of_a_hosts_vlm_is_of_one_part(family):
    model = host_model(family)
    cells = check_total(model)
    held = set(cells.values())
    assert {"experts", "routers", "attention", "norms", "embeddings"} <= held
    assert {"vision.experts", "vision.routers", "vision.attention", "vision.embeddings", "connector.mlp"} <= held
    assert "others" not in held
    experts = {name for name, cell in cells.items() if cell.endswith("experts")}
    assert experts == {name for name in cells if ".experts." in name}
    assert {name for name, cell in cells.items() if cell.endswith("routers")} == {n for n in cells if ".router." in n}


def test_dense_and_delta_models_are_mapped_too():
    dense = check_total(models.sparse_model(text_moe=None, vision_moe=None, connector_moe=None))
    assert {"mlp", "vision.mlp", "connector.mlp"} <= set(dense.values())
    assert not {"experts", "routers"} & set(dense.values())
    delta = models.EXPERTS | {"expert_type": "delta", "expert_rank": 2}
    cells = check_total(models.sparse_model(text_moe=delta, vision_moe=delta, connector_moe=delta))
    assert {cell for name, cell in cells.items() if ".deltas." in name} == {
        "experts",
        "vision.experts",
        "connector.experts",
    }


def test_a_model_beside_the_towers_is_of_the_others():
    model = models.sparse_model()
    model.model.audio_tower = tiny.vision_model("clip")
    cells = check_total(model)
    assert {cell for name, cell in cells.items() if ".audio_tower." in name} == {"others"}
    assert "others" not in cells_of("all")


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("vision", tiny.VISION_FAMILIES)
def test_what_no_gradient_reaches_is_what_a_step_gives_none(vision, layer):
    model = models.sparse_model("llama", vision, vision_feature_layer=layer, vision_moe=None)
    found = idle_parameters(model, parameter_cells(model))
    assert found == without_gradient(model, models.batch())
    assert found


@pytest.mark.parametrize("family", often(hosts.HOSTS, "llava_next", "llava_onevision", "gemma3", "qwen2_5_vl"))
def test_what_no_gradient_reaches_in_a_hosts_vlm(family):
    model = host_model(family)
    found = idle_parameters(model, parameter_cells(model))
    assert found == without_gradient(model, hosts.inputs(hosts.processor(family), family))


def test_names_of_adapted_parameters_are_those_of_the_bare_model():
    model = models.sparse_model()
    cells = parameter_cells(model)
    paths = cells_by_path(cells)
    given = {"train_connector": True, "lora_parts": ["text", "vision"], "train": ["norms"]}
    adapted = prepare_model(model, FinetuneSettings(**given))
    for name, parameter in nn.ModuleDict({"module": adapted}).named_parameters():
        assert bare_name(name) in paths, name
        if "lora_" in name:
            kind = "experts" if ".experts." in name else "mlp" if ".mlp." in name else "attention"
            assert paths[bare_name(name)].rpartition(".")[2] == kind, name
        elif parameter.requires_grad:
            assert torch.is_floating_point(parameter)
            assert bare_name(name) in cells, name


def test_presets_are_of_cells_and_the_most_exact_name_wins():
    assert all(set(cells_of(name)) <= set(CELLS) for name in NAMES)
    assert set(PRESETS) == {"moe-layers", "llm", "all-but-vision", "all"}
    assert set(cells_of("text")) == set(KINDS) == set(cells_of("llm"))
    assert most_exact("vision.experts", ["vision", "experts"]) == "vision"
    assert most_exact("vision.experts", ["vision", "vision.experts"]) == "vision.experts"
    assert most_exact("experts", ["text", "vision"]) == "text"
    assert most_exact("norms", ["experts"]) is None
