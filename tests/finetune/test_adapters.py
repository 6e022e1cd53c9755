"""Exactly what a recipe names is trained."""

import pytest
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.finetune import lora_config, prepare_model
from modeling_vlmoe.routed_lora import is_wrapper, unwrapped
from modeling_vlmoe.sparse_moe import Experts
from tests import models, tiny

ATTENTION = {"llama": {"q_proj", "k_proj", "v_proj", "o_proj"}, "phi3": {"qkv_proj", "o_proj"}}
LAYERS, VISION_LAYERS = range(3), range(3)  # the ViT has four, of which the connector reads the third's output


def trained(model):
    """The names of trainable parameters, as in the model without PEFT: `lora:` before those that LoRA adapts."""
    names = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("base_model.model.").replace("base_layer.", "")
        if ".lora_" in name:
            names.add(f"lora:{name.partition('.lora_')[0]}")
        else:
            names.add(name.replace("modules_to_save.default.", ""))
    return names


def attention(prefix, layers, names, path="self_attn"):
    return {f"lora:{prefix}.{layer}.{path}.{name}" for layer in layers for name in names}


TEXT, VISION = "model.language_model.layers", "model.vision_tower.encoder.layers"
EXPERTS = {f"lora:{TEXT}.{layer}.mlp.experts" for layer in LAYERS}
ROUTERS = {f"{TEXT}.{layer}.mlp.router.weight" for layer in LAYERS}
SPARSE_CONNECTOR = {
    "router.weight",
    *(f"experts.{part}_proj{bias}" for part in ("up", "down") for bias in ("", "_bias")),
}
CONNECTOR = {f"model.connector.mlp.{name}" for name in SPARSE_CONNECTOR}
VISION_ATTENTION = attention(VISION, VISION_LAYERS, {"q_proj", "k_proj", "v_proj", "out_proj"})


def test_align_trains_the_connector_with_router_and_experts(model, arguments):
    assert trained(prepare_model(model, arguments(method="align"))) == CONNECTOR


def test_align_trains_a_dense_connector(dense_base, arguments):
    model = AutoModelForImageTextToText.from_pretrained(dense_base)
    wanted = {f"model.connector.mlp.linear_{index}.{kind}" for index in (1, 2) for kind in ("weight", "bias")}
    assert trained(prepare_model(model, arguments(method="align"))) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, attention(TEXT, LAYERS, ATTENTION["llama"]) | EXPERTS | ROUTERS),
        ({"train_routers": False, "lora_targets": ["experts"]}, EXPERTS),
        ({"lora_targets": ["attention"], "train_connector": True, "train_routers": False},
         attention(TEXT, LAYERS, ATTENTION["llama"]) | CONNECTOR),
        ({"lora_parts": ["vision"], "lora_targets": ["attention"], "train_routers": False}, VISION_ATTENTION),
        # Of the ViT's layers 0 to 2, which the connector sees, 1 and 2 are sparse.
        ({"lora_parts": ["vision"], "lora_targets": ["mlp", "experts"]},
         {f"lora:{VISION}.0.mlp.fc1", f"lora:{VISION}.0.mlp.fc2"}
         | {f"lora:{VISION}.{layer}.mlp.experts" for layer in (1, 2)}
         | {f"{VISION}.{layer}.mlp.router.weight" for layer in (1, 2)}),
    ],
    ids=["default", "experts", "connector", "vision attention", "vision mlp"],
)  # fmt: skip
def test_lora_trains_exactly_what_is_named(model, arguments, given, wanted):
    assert trained(prepare_model(model, arguments(**given))) == wanted


def test_both_expert_stacks_of_each_layer_get_lora(model, arguments):
    config = lora_config(model, arguments())
    stacks = [f"{TEXT}.{layer}.mlp.experts.{name}_proj" for layer in LAYERS for name in ("gate_up", "down")]
    assert sorted(config.target_parameters) == sorted(stacks)


def test_a_dense_model_gets_lora_on_its_mlps(dense_base, arguments):
    model = AutoModelForImageTextToText.from_pretrained(dense_base)
    mlps = {f"lora:{TEXT}.{layer}.mlp.{name}_proj" for layer in LAYERS for name in ("gate", "up", "down")}
    tuned = prepare_model(model, arguments(lora_dropout=0.1))
    assert trained(tuned) == attention(TEXT, LAYERS, ATTENTION["llama"]) | mlps


@pytest.mark.parametrize("text", tiny.TEXT_FAMILIES)
@pytest.mark.parametrize("vision", tiny.VISION_FAMILIES)
def test_attention_is_found_by_structure(text, vision, arguments):
    model = models.sparse_model(text, vision)
    config = lora_config(model, arguments(lora_parts=["text", "vision"], lora_targets=["attention"]))
    found = {name.rpartition(".")[2] for name in config.target_modules}
    assert found == ATTENTION.get(text, ATTENTION["llama"]) | {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert all(".self_attn." in name for name in config.target_modules)
    assert len(config.target_modules) == 3 * len(ATTENTION.get(text, ATTENTION["llama"])) + 3 * 4


def test_partly_sparse_tower_mixes_experts_and_mlps(arguments):
    model = models.sparse_model(text_moe=models.EXPERTS | {"layers": [1]})
    config = lora_config(model, arguments(lora_targets=["mlp", "experts"]))
    dense = {f"{TEXT}.{layer}.mlp.{name}_proj" for layer in (0, 2) for name in ("gate", "up", "down")}
    assert set(config.target_modules) == dense
    assert set(config.target_parameters) == {f"{TEXT}.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    assert config.modules_to_save == [f"{TEXT}.1.mlp.router"]


def test_loss_weights_reach_every_part(model, arguments):
    prepare_model(model, arguments(router_aux_loss_coef=0.5, router_z_loss_coef=0.25))
    assert model.config.text_config.router_aux_loss_coef == 0.5
    for part in ("text", "vision", "connector"):
        assert (model.config.moe(part).router_aux_loss_coef, model.config.moe(part).router_z_loss_coef) == (0.5, 0.25)


def test_raises_when_loss_weights_are_negative(model, arguments):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is -1"):
        prepare_model(model, arguments(router_aux_loss_coef=-1.0))


def test_a_recipe_gives_linears_and_experts_dropout(model, arguments):
    tuned = prepare_model(model, arguments(lora_dropout=0.1))
    assert tuned.peft_config["default"].lora_dropout == 0
    linears = [one for one in tuned.modules() if isinstance(one, LoraLayer) and not is_wrapper(one)]
    assert {one.lora_dropout["default"].p for one in linears} == {0.1}
    adapted = [unwrapped(one)[0] for one in tuned.modules() if is_wrapper(one)]
    assert {one.lora_dropout for one in adapted if isinstance(one, Experts)} == {0.1}


def test_a_recipe_without_experts_leaves_dropout_to_peft(model, arguments):
    tuned = prepare_model(model, arguments(lora_dropout=0.1, lora_targets=["attention"]))
    assert tuned.peft_config["default"].lora_dropout == 0.1


def test_raises_when_pefts_configuration_is_to_hold_the_experts_dropout(model):
    with pytest.raises(ValueError, match=r"lora_dropout is 0.1, but LoRA on experts \(here: text\) has no dropout"):
        lora_config(model, lora_dropout=0.1)
    assert lora_config(model, lora_dropout=0.1, lora_targets=["attention"]).lora_dropout == 0.1


def test_raises_when_nothing_matches(dense_base, arguments):
    model = AutoModelForImageTextToText.from_pretrained(dense_base)
    with pytest.raises(ValueError, match="match nothing in the parts"):
        prepare_model(model, arguments(lora_targets=["experts"]))
