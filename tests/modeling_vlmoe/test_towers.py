import pytest
import torch
from torch import nn
from transformers import AutoModel

from modeling_vlmoe import MoEConfig
from modeling_vlmoe.towers import find_dense_mlp, make_sparse, num_prefix_tokens, sparse_tower_class
from tests import tiny
from tests.models import gap

MOE = MoEConfig(num_experts=4, layers=[0, 2])
TOWERS = [*tiny.TEXT_FAMILIES, *tiny.VISION_FAMILIES]


def dense_tower(family):
    return tiny.vision_model(family) if family in tiny.VISION_FAMILIES else tiny.text_model(family).base_model


def run(tower, family):
    torch.manual_seed(3)
    if family in tiny.VISION_FAMILIES:
        return tower(torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)).last_hidden_state
    return tower(torch.randint(6, 290, (2, 9))).last_hidden_state


@pytest.mark.parametrize("family", TOWERS)
@torch.no_grad()
def test_made_sparse_in_place_a_tower_computes_the_same(family):
    tower = dense_tower(family)
    wanted, dense_class = run(tower, family), type(tower)
    sparse = make_sparse(tower, MOE, copy=True)
    assert sparse is tower
    assert isinstance(tower, dense_class)
    assert type(tower) is sparse_tower_class(dense_class)
    assert gap(run(tower, family), wanted) <= 1e-5


MUTANTS = {
    "an expert swapped": lambda block: block.experts.down_proj.data[0].copy_(
        block.experts.down_proj.data[0].roll(1, 0)
    ),
    "up rows swapped": lambda block: stack(block).data.copy_(stack(block).data.roll(stack(block).shape[1] // 2, 1)),
    "renorm off": lambda block: setattr(block.router.moe, "norm_topk_prob", False),
    "a bias dropped": lambda block: block.experts.up_proj_bias.data.zero_(),
}


def stack(block):
    return block.experts.gate_up_proj if block.experts.is_gated else block.experts.up_proj


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("family", TOWERS)
@torch.no_grad()
def test_mutants_of_the_experts_do_not_compute_the_same(family, mutant):
    tower = dense_tower(family)
    wanted = run(tower, family)
    make_sparse(tower, MoEConfig(num_experts=4, layers=[0, 2]), copy=True)
    block = find_block(tower)
    if mutant == "a bias dropped" and not block.experts.is_biased:
        block.experts.down_proj.data[2] *= 1.01  # an LLM's MLP has no bias to drop
    else:
        MUTANTS[mutant](block)
    assert gap(run(tower, family), wanted) > 1e-3


def find_block(tower):
    return next(module for module in tower.modules() if hasattr(module, "router") and hasattr(module, "experts"))


@pytest.mark.parametrize("family", TOWERS)
def test_raises_when_a_layer_has_no_known_mlp(family):
    tower = dense_tower(family)
    layers = tower.encoder.layers if hasattr(tower, "encoder") else tower.layers
    layers[2].mlp = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"layers\.2 has no MLP that matches: .* match none of the known MLP layouts"):
        make_sparse(tower, MOE)
    del layers[0].mlp
    with pytest.raises(ValueError, match=r"layers\.0 has no MLP that matches: expected exactly one of mlp"):
        make_sparse(tower, MOE)


def test_raises_when_a_layer_is_sparse_already():
    tower = make_sparse(dense_tower("llama"), MOE)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp is sparse already"):
        make_sparse(tower, MOE)


def test_raises_when_a_tower_has_no_layers():
    from transformers import ResNetConfig

    with pytest.raises(ValueError, match="has no list of layers"):
        find_dense_mlp(AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])), 0)


def test_only_the_pooling_head_is_left_out_of_siglips_mlps():
    tower = tiny.vision_model("siglip")
    assert [find_dense_mlp(tower, i).path for i in range(4)] == [f"encoder.layers.{i}.mlp" for i in range(4)]


def test_class_tokens_are_found():
    assert num_prefix_tokens(tiny.vision_model("clip")) == 1
    assert not num_prefix_tokens(tiny.vision_model("siglip"))


def test_one_class_per_backbone_and_its_layers_may_not_be_split():
    tower = make_sparse(dense_tower("qwen3"), MOE)
    assert type(tower) is type(make_sparse(dense_tower("qwen3"), MOE))
    assert {"Qwen3DecoderLayer", "SparseQwen3DecoderLayer"} <= set(tower._no_split_modules)
    assert type(tower.layers[0]).__name__ == "SparseQwen3DecoderLayer"
    assert type(tower.layers[1]).__name__ == "Qwen3DecoderLayer"


def test_split_rules_follow_the_experts():
    tower = make_sparse(dense_tower("llama"), MoEConfig(num_experts=4, layers=[0, 1, 2]))
    assert tower._tp_plan["layers.*.mlp.experts.gate_up_proj"] == "packed_colwise"
    assert tower._ep_plan["layers.*.mlp.experts"] == "ep_dispatch_experts"
    assert "layers.*.mlp.gate_proj" not in tower._tp_plan
    half_dense = make_sparse(dense_tower("llama"), MOE)
    assert half_dense._tp_plan["layers.*.mlp.gate_proj"] == "colwise"
