import copy
import pickle
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_vlmoe import MoEConfig, VLMoEConfig
from tests import tiny
from tests.models import sparse_config


def test_defaults_are_an_explicit_list_of_layers():
    config = sparse_config(text_moe={}, vision_moe={}, connector_moe={})
    assert (config.text_moe.num_experts, config.text_moe.num_experts_per_tok) == (8, 2)
    assert config.text_moe.layers == [0, 1, 2]
    # 4 layers, the connector reads hidden state -2: three layers feed it, sparse from max(1, 3 // 2) on
    assert (config.vision_moe.num_experts, config.vision_moe.layers) == (4, [1, 2])
    assert (config.connector_moe.num_experts, config.connector_moe.layers) == (4, None)


def test_text_fields_have_one_home():
    config = sparse_config()
    assert config.text_config.num_experts == 4
    assert "num_experts" not in config.to_dict()["text_moe"]
    config.text_config.router_aux_loss_coef = 0.5  # as TRL does
    assert config.text_moe.router_aux_loss_coef == 0.5
    config.text_moe.num_experts_per_tok = 1
    assert config.text_config.num_experts_per_tok == 1


def test_a_dense_text_config_is_left_alone():
    dense = tiny.text_config("llama")
    sparse = VLMoEConfig(text_config=dense, vision_config=tiny.vision_config("clip"), text_moe={})
    assert not hasattr(dense, "num_experts")
    assert sparse.text_config is not dense
    assert not hasattr(
        VLMoEConfig(text_config=dense, vision_config=tiny.vision_config("clip")).text_config, "num_experts"
    )


def test_save_and_load_keep_every_part(tmp_path):
    config = sparse_config(connector_moe=None)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.connector_moe is None
    assert set(loaded.auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"}


def test_overrides_reach_the_parts(tmp_path):
    sparse_config().save_pretrained(tmp_path)
    by_home = AutoConfig.from_pretrained(tmp_path, text_config={"num_experts_per_tok": 1})
    by_part = AutoConfig.from_pretrained(
        tmp_path, text_moe={"num_experts_per_tok": 1}, vision_moe={"num_experts_per_tok": 3}
    )
    assert by_home.text_moe.num_experts_per_tok == by_part.text_moe.num_experts_per_tok == 1
    assert (by_part.vision_moe.num_experts, by_part.vision_moe.num_experts_per_tok) == (4, 3)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))], ids=["copy", "pickle"]
)
def test_copies_read_their_own_text_config(again):
    config = sparse_config()
    twin = again(config)
    twin.text_config.num_experts_per_tok = 1
    assert (twin.text_moe.num_experts_per_tok, config.text_moe.num_experts_per_tok) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text_moe": {"num_experts": 4, "num_experts_per_tok": 5}},
            "text_moe.num_experts_per_tok is 5, but there are 4 experts",
        ),
        ({"vision_moe": {"num_experts_per_tok": 0}}, "vision_moe.num_experts_per_tok is 0"),
        ({"text_moe": {"num_experts": 0}}, "text_moe.num_experts is 0"),
        ({"text_moe": {"num_experts": "four"}}, "text_moe: .*num_experts"),
        ({"text_moe": {"layers": [1, 3]}}, r"layers \[3\], but the text tower has 3 \(0 to 2\)"),
        ({"text_moe": {"layers": [1, 1]}}, "names a layer twice"),
        ({"text_moe": {"layers": []}}, "text_moe.layers is empty"),
        ({"vision_moe": {"layers": [9]}}, r"vision tower has 4 \(0 to 3\)"),
        ({"vision_moe": {"layers": [3]}}, "experts beyond it would never get a gradient"),
        ({"vision_moe": {}, "vision_feature_layer": 1}, "vision_moe has no layer to make sparse"),
        ({"vision_feature_layer": 6}, "vision_feature_layer is 6"),
        ({"connector_moe": {"layers": [0]}}, "connector is one MLP"),
        ({"text_moe": {"num_expert": 4}}, r"unknown fields \['num_expert'\]"),
        ({"text_moe": {"router_type": "hash"}}, "router_type"),
        ({"text_moe": {"num_experts": 2, "router_logit_norm": 1.0}}, "2 experts to choose from.*cannot learn"),
        (
            {"text_moe": {"num_experts": 4, "router_logit_norm": 1.0, "modality_routing": "isolated"}},
            "2 experts to choose from.*cannot learn",
        ),
        ({"text_moe": {"router_aux_loss_coef": -0.1}}, "router_aux_loss_coef is -0.1"),
        ({"text_moe": 8}, "text_moe is 8; expected a MoEConfig"),
    ],
)
def test_raises_when_a_field_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        sparse_config(**({"text_moe": None, "vision_moe": None, "connector_moe": None} | fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_feature_select_strategy", "middle"),
        ("vision_feature_layer", "last"),
        ("connector_bias", "yes"),
        ("connector_hidden_act", 3),
        ("image_token_id", "<image>"),
        ("text_config", 7),
        ("vision_config", "google/siglip-base-patch16-224"),
    ],
)
def test_raises_when_a_field_is_of_another_type(field, value):
    towers = {"text_config": tiny.text_config("llama"), "vision_config": tiny.vision_config("siglip")}
    with pytest.raises((ValueError, StrictDataclassError), match=f"{field}.*{re.escape(str(value))}"):
        VLMoEConfig(**(towers | {field: value}))


def test_raises_when_a_text_field_is_given_twice_and_unlike():
    text = tiny.text_config("llama", num_experts=8)
    with pytest.raises(ValueError, match=r"text_moe\.num_experts is 4, but text_config\.num_experts is 8"):
        VLMoEConfig(text_config=text, vision_config=tiny.vision_config("clip"), text_moe=MoEConfig(num_experts=4))


def test_raises_when_the_llm_is_sparse_already():
    mixtral = AutoConfig.for_model("mixtral", num_hidden_layers=2)
    with pytest.raises(ValueError, match="mixtral configuration, which is sparse already"):
        VLMoEConfig(text_config=mixtral, vision_config=tiny.vision_config("clip"), text_moe={})


def test_a_bad_override_is_found_when_the_model_is_built(tmp_path):
    from modeling_vlmoe import VLMoEForConditionalGeneration

    sparse_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, text_config={"num_experts_per_tok": 9})
    with pytest.raises(ValueError, match="num_experts_per_tok is 9"):
        VLMoEForConditionalGeneration(config)
