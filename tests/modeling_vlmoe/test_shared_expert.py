"""The shared expert: a dense MLP beside the routed experts, weighted by the sigmoid of a gate (Qwen2-MoE)."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_vlmoe import MoEConfig, VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.mlp_layouts import find_layout
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.modeling_vlmoe.test_sparse_moe import IMPLEMENTATIONS, MLPS, block_and_dense
from tests.models import EXPERTS, batch, gap, sparse_config, sparse_model

SHARED = {"num_shared_experts": 1, "shared_expert_intermediate_size": 20}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", MLPS)
def test_block_is_the_routed_sum_and_the_gated_shared_expert(name, bias, implementation):
    plain, _ = block_and_dense(name, bias, implementation)
    block, dense = block_and_dense(name, bias, implementation, **SHARED)
    block.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 8)
    share = 1 / (1 + torch.exp(-(x @ block.shared_expert_gate.weight[0])))
    wanted = plain(x) + share[..., None] * block.shared_expert(x)
    torch.testing.assert_close(block(x), wanted, atol=2e-6, rtol=1e-5)
    down = find_layout(dense, "mlp").down
    assert getattr(block.shared_expert, down).in_features == 20
    assert type(block.shared_expert) is type(dense)


def test_it_is_as_wide_as_the_experts_where_no_width_is_given():
    model = sparse_model(text_moe=EXPERTS | {"num_shared_experts": 1, "moe_intermediate_size": 16})
    assert model.config.text_config.shared_expert_intermediate_size == 16
    block = model.model.language_model.layers[0].mlp
    assert block.shared_expert.down_proj.in_features == 16


def test_its_fields_live_on_the_text_configuration_and_come_back(tmp_path):
    config = sparse_config(text_moe=EXPERTS | SHARED)
    assert (config.text_config.num_shared_experts, config.text_moe.num_shared_experts) == (1, 1)
    assert "num_shared_experts" not in config.to_dict()["text_moe"]
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.text_moe.shared_expert_intermediate_size == 20
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_a_configuration_from_before_has_none():
    given = sparse_config().to_dict()
    del given["text_config"]["num_shared_experts"]
    assert VLMoEConfig(**given).text_moe.num_shared_experts == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_shared_experts": 2},
            r"text_moe.num_shared_experts is 2; expected 0 or 1. Several shared experts are one",
        ),
        ({"shared_expert_intermediate_size": 8}, "there is no shared expert; set num_shared_experts to 1"),
        (SHARED | {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0; expected 1 or more"),
    ],
    ids=str,
)
def test_raises_when_the_fields_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=message):
        sparse_config(text_moe=EXPERTS | fields)


@torch.no_grad()
@pytest.mark.parametrize("part", ["text_moe", "vision_moe", "connector_moe"])
def test_every_part_may_have_one_and_saving_keeps_it(tmp_path, part):
    model = sparse_model(**{part: EXPERTS | SHARED})
    blocks = [block for _, block in sparse_blocks(model) if block.shared_expert is not None]
    assert len(blocks) == {"text_moe": 3, "vision_moe": 2, "connector_moe": 1}[part]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_it_is_initialised():
    model = VLMoEForConditionalGeneration(sparse_config(text_moe=EXPERTS | SHARED))
    for _, block in sparse_blocks(model.model.language_model):
        for parameter in (*block.shared_expert.parameters(), block.shared_expert_gate.weight):
            assert 0.01 < parameter.std() < 0.03


def test_router_losses_do_not_depend_on_it():
    inputs = batch() | {"labels": batch()["input_ids"]}
    plain = sparse_model(text_moe=EXPERTS | {"layers": [0]}, vision_moe=None, connector_moe=None).train()
    shared = sparse_model(text_moe=EXPERTS | SHARED | {"layers": [0]}, vision_moe=None, connector_moe=None).train()
    shared.load_state_dict(plain.state_dict(), strict=False)
    losses = [model(**inputs).router_losses["text"] for model in (plain, shared)]
    torch.testing.assert_close(*losses)
    loss = shared(**inputs).loss
    loss.backward()
    block = shared.model.language_model.layers[0].mlp
    assert all(parameter.grad.abs().max() > 0 for parameter in block.parameters())


@torch.no_grad()
def test_generation_with_a_static_cache_and_compiled_is_the_same():
    model = sparse_model(text_moe=EXPERTS | SHARED, vision_moe=None, connector_moe=None)
    inputs = batch((1,))
    dynamic = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(
        dynamic, model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation="static")
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert gap(compiled(**inputs).logits, model(**inputs).logits) <= 1e-5


def test_raises_when_copies_are_to_stand_beside_it(parents):
    with pytest.raises(ValueError, match="experts are to be copies of the dense MLP, which a shared expert"):
        VLMoEForConditionalGeneration.from_vision_text_pretrained(
            parents / "clip", parents / "llama", text_moe=MoEConfig(num_experts=4, num_shared_experts=1)
        )


@pytest.fixture
def parents(tmp_path):
    tiny.save_text_parent(tmp_path / "llama", "llama")
    tiny.save_vision_parent(tmp_path / "clip", "clip")
    return tmp_path
