"""Every spelling of a dense MLP becomes experts that compute the same, and no mutant of them does."""

import copy

import pytest
import torch
from torch import nn

from modeling_vlmoe import MoEConfig
from modeling_vlmoe.conversion.backbones.families import VISION_TABLES, registered_class
from modeling_vlmoe.conversion.backbones.measuring import run_tower
from modeling_vlmoe.conversion.backbones.tiny_parents import build_parent
from modeling_vlmoe.conversion.backbones.tower_inputs import call_form
from modeling_vlmoe.mlp_layouts import LAYOUTS, find_layout, output_dropout, run_dense
from modeling_vlmoe.towers import find_dense_mlp, make_sparse, sparse_blocks
from tests.models import gap

# A family of each layout.
FAMILIES = {
    "gated": ("text", "llama", {}),
    "gated, wrapped": ("vision", "gemma4_vision", {}),
    "gated, fused": ("text", "phi3", {}),
    "plain": ("vision", "clip_vision_model", {}),
    "plain, gated and fused": ("text", "moshi", {}),
    "up and down": ("text", "apertus", {}),
    "numbered": ("text", "lfm2", {}),
    "transposed": ("text", "gpt2", {}),
    "c_fc": ("text", "starcoder2", {}),
    "fc_in": ("text", "gptj", {}),
    "h to 4h": ("text", "bloom", {}),
    "Wi, gated and fused": ("text", "modernbert-decoder", {}),
    "proj_up": ("text", "xlstm", {}),
    "linear_fc": ("vision", "qwen3_vl_vision", {}),
    "lin": ("vision", "sam_vision_model", {}),
    "sequential": ("text", "ctrl", {}),
    "in the layer": ("text", "opt", {}),
    "intermediate and output": ("vision", "dpt", {}),
}
# Connectors have tests of their own; the host cannot initialise a fused xLSTM (transformers 5.23).
ELSEWHERE = {"connector", "in the projector", "in the merger", "proj_up, fused"}
# MLPs that compute more than their Linears and their activation.
UNUSUAL = {
    "a norm inside": ("text", "bitnet", {}),
    "multipliers": ("text", "falcon_h1", {}),
    "a limit": ("vision", "glm5_next_vision", {"swiglu_limit": 0.3}),
    "a residual": ("text", "mpt", {}),
    "biases": ("text", "granite", {"mlp_bias": True}),
}
CASES = FAMILIES | UNUSUAL
SPARSE_LAYERS = [0, 2]


def tower(name):
    part, family, fields = CASES[name]
    made = build_parent(family, part, **fields)
    return made.base_model if part == "text" else made


def run(made, name):
    part, family, _ = CASES[name]
    if part == "text":
        ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(1))
        return made(input_ids=ids, use_cache=False).last_hidden_state
    inputs = call_form(family, registered_class(family, VISION_TABLES)).inputs(made.config)
    return run_tower(made, inputs)["last_hidden_state.0"]


def test_every_layout_has_a_family_here():
    assert set(FAMILIES) == {layout.name for layout in LAYOUTS} - ELSEWHERE


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_experts_compute_what_the_dense_mlp_computes(name):
    made = tower(name)
    wanted = run(made, name)
    mlp = find_dense_mlp(made, 0)
    assert name in UNUSUAL or mlp.layout.name == name
    make_sparse(made, MoEConfig(num_experts=4, layers=SPARSE_LAYERS), copy=True)
    assert len(sparse_blocks(made)) == len(SPARSE_LAYERS)
    assert gap(run(made, name), wanted) <= 1e-5


def stack(block):
    return block.experts.gate_up_proj if block.experts.is_gated else block.experts.up_proj


def drop_bias(block, made):
    block.experts.down_proj_bias.data[1].zero_()


def swap_gate_and_up(block, made):
    stack(block).data.copy_(stack(block).data.roll(block.experts.intermediate_size, 1))


def take_another_layer(block, made):
    block.experts.down_proj.data.copy_(sparse_blocks(made)[1][1].experts.down_proj.data)


def roll_an_expert(block, made):
    block.experts.down_proj.data[0].copy_(block.experts.down_proj.data[0].roll(1, 0))


def roll_a_gate(block, made):
    stack(block).data[3].copy_(stack(block).data[3].roll(1, 0))


# Each mutant, and whether there is something to change in experts.
MUTANTS = {
    drop_bias: lambda experts: experts.is_biased,
    swap_gate_and_up: lambda experts: experts.is_gated,
    take_another_layer: lambda experts: True,
    roll_an_expert: lambda experts: True,
    roll_a_gate: lambda experts: True,
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_no_mutant_computes_the_same(name):
    dense = tower(name)
    wanted, found = run(dense, name), {}
    for mutate, applies in MUTANTS.items():
        made = make_sparse(copy.deepcopy(dense), MoEConfig(num_experts=4, layers=SPARSE_LAYERS), copy=True)
        block = sparse_blocks(made)[0][1]
        if applies(block.experts):
            mutate(block, made)
            found[mutate.__name__] = gap(run(made, name), wanted)
    assert len(found) >= 3
    assert not {mutant: one for mutant, one in found.items() if one <= 1e-4}


@torch.no_grad()
def test_a_transposed_weight_is_turned():
    made = tower("transposed")
    stored = find_dense_mlp(made, 0).module.c_fc.weight
    make_sparse(made, MoEConfig(num_experts=2, layers=[0]), copy=True)
    experts = sparse_blocks(made)[0][1].experts
    assert experts.up_proj.shape[1:] == stored.shape[::-1] != stored.shape
    assert torch.equal(experts.up_proj[1], stored.T)


@pytest.mark.parametrize(("name", "field"), [("transposed", "resid_pdrop"), ("h to 4h", "hidden_dropout")])
def test_dropout_on_the_result_stays_in_training(name, field):
    part, family, _ = FAMILIES[name]
    made = build_parent(family, part, **{field: 0.5}).base_model
    mlp = find_dense_mlp(made, 0)
    assert output_dropout(mlp.module, mlp.layout) == 0.5
    make_sparse(made, MoEConfig(num_experts=2, layers=[0]), copy=True)
    block = sparse_blocks(made)[0][1]
    x = torch.randn(2, 50, made.config.hidden_size)
    steady = block.eval()(x)
    torch.manual_seed(0)
    dropped = block.train()(x)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(dropped[dropped != 0], 2 * steady[dropped != 0])


def test_experts_share_what_an_activation_has_learnt(tmp_path):
    made = tower("up and down")
    activation = find_dense_mlp(made, 0).module.act_fn
    make_sparse(made, MoEConfig(num_experts=4, layers=[0]), copy=True)
    experts = sparse_blocks(made)[0][1].experts
    assert experts.act_fn is activation
    assert {"act_fn.alpha_p", "act_fn.alpha_n"} <= {name for name, _ in experts.named_parameters()}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "mamba",
            {},
            r"layers\.0 has no MLP that matches: expected exactly one of mlp, .* found none among its child",
        ),
        (
            "biogpt",
            {"activation_dropout": 0.1},
            r"layers\.0 has no MLP .*activation_dropout=0\.1.*set to 0 in the conf",
        ),
        ("modernbert-decoder", {"mlp_dropout": 0.1}, r"computes more than its Linears .* drop \(Dropout\)"),
        (
            "gemma3n_text",
            {"activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]},
            r"layers\.0 .* activation_sparsity=0\.9",
        ),
        ("rwkv", {}, r"Linear children \[key \(32 to 48\), receptance .* match none of the known MLP layouts"),
    ],
)
def test_raises_when_experts_would_leave_something_out(family, fields, message):
    made = build_parent(family, "text", **fields).base_model
    with pytest.raises(ValueError, match=message):
        make_sparse(made, MoEConfig(num_experts=2, layers=[0]), copy=True)


def test_a_shared_expert_is_refused_where_the_mlp_is_no_module():
    made = tower("in the layer")
    with pytest.raises(ValueError, match=r"num_shared_experts is 1, but the dense MLP .* spread over its layer"):
        make_sparse(made, MoEConfig(num_experts=2, layers=[0], num_shared_experts=1))


def test_a_dense_mlp_that_is_given_a_residual_is_run_without_one():
    mlp = find_dense_mlp(tower("a residual"), 0)
    x = torch.randn(1, 3, 32)
    assert find_layout(mlp.module, mlp.path) is mlp.layout
    torch.testing.assert_close(run_dense(mlp.module, mlp.layout, x), mlp.module(x, torch.zeros_like(x)))
    assert isinstance(mlp.module, nn.Module)
