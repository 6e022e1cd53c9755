"""The block against a loop too simple to be wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from modeling_vlmoe import MoEConfig
from modeling_vlmoe.mlp_layouts import find_layout
from modeling_vlmoe.routers import Router
from modeling_vlmoe.sparse_moe import SparseMoE
from tests.tiny import redraw


class GatedMLP(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=bias), nn.Linear(8, 12, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(12, 8, bias=bias), ACT2FN["silu"]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FusedMLP(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 24, bias=bias), nn.Linear(12, 8, bias=bias)
        self.activation_fn = ACT2FN["silu"]

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


class PlainMLP(nn.Module):
    def __init__(self, bias, out=8):
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = (
            nn.Linear(8, 12, bias=bias),
            nn.Linear(12, out, bias=bias),
            ACT2FN["gelu"],
        )

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))


MLPS = {
    "gated": GatedMLP,
    "fused": FusedMLP,
    "plain": PlainMLP,
    "wider": lambda b: PlainMLP(b, 11),
    "narrower": lambda b: PlainMLP(b, 5),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def block_and_dense(name, bias, implementation="eager", **fields):
    dense = redraw(MLPS[name](bias))
    config = PreTrainedConfig()
    config._experts_implementation_internal = implementation
    block = SparseMoE(config, MoEConfig(num_experts=4, **fields), dense, num_layers=1)
    return redraw(block, seed=3), dense


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "raw"])
def test_block_equals_a_loop_over_tokens_and_dense_mlps(name, bias, implementation, renorm):
    block, dense = block_and_dense(name, bias, implementation, norm_topk_prob=renorm)
    x = torch.randn(2, 5, 8)
    layout, rows = find_layout(dense, "mlp"), []
    for token in x.reshape(-1, 8):
        p = (block.router.weight @ token).softmax(-1)
        best = p.argsort(descending=True)[:2]
        total = 0
        for expert in best:
            for stack, sources in layout.expert_sources(bias).items():
                parts = getattr(block.experts, stack)[expert].split([dense.get_parameter(s).shape[0] for s in sources])
                for source, part in zip(sources, parts, strict=True):
                    dense.get_parameter(source).data.copy_(part)
            total = total + p[expert] / (p[best].sum() if renorm else 1) * dense(token)
        rows.append(total)
    torch.testing.assert_close(block(x), torch.stack(rows).view(2, 5, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("name", MLPS)
def test_copies_compute_the_dense_mlp_whatever_the_router(name, bias):
    block, dense = block_and_dense(name, bias, "grouped_mm")
    block.experts.copy_dense(dense, find_layout(dense, "mlp"))
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(block(x), dense(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MLPS)
def test_implementations_give_the_same_gradients(name):
    found = {}
    for implementation in IMPLEMENTATIONS:
        block, _ = block_and_dense(name, True, implementation)
        torch.manual_seed(1)
        x = torch.randn(9, 8, requires_grad=True)
        block(x).square().sum().backward()
        found[implementation] = {"x": x.grad} | {n: p.grad for n, p in block.named_parameters()}
    for implementation in IMPLEMENTATIONS[1:]:
        for name_, gradient in found["eager"].items():
            torch.testing.assert_close(found[implementation][name_], gradient, atol=1e-5, rtol=1e-5)


def test_router_scores_in_float32_under_autocast_and_in_bf16():
    router = Router(8, MoEConfig(num_experts=4))
    redraw(router)
    x = torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, weights, _ = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x, router.weight))
    logits, weights, _ = router.to(torch.bfloat16)(x.bfloat16())
    assert logits.dtype == weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "fc3", nn.Linear(2, 2)), "match none of the known MLP layouts"),
        (
            lambda m: setattr(m, "dropout", nn.Dropout(0.1)),
            r"computes more than its Linears and its activation: dropout",
        ),
        (lambda m: setattr(m, "norm", nn.LayerNorm(12)), r"norm \(LayerNorm\)"),
        (lambda m: setattr(m.fc1, "bias", None), r"bias in \['fc2'\] only"),
        (lambda m: delattr(m, "activation_fn"), "no activation under any of the names"),
    ],
)
def test_raises_when_an_mlp_is_not_of_a_known_layout(change, message):
    mlp = PlainMLP(True)
    change(mlp)
    with pytest.raises(ValueError, match=message):
        find_layout(mlp, "layers.0.mlp")


def test_dropout_of_nothing_is_no_obstacle():
    mlp = PlainMLP(True)
    mlp.dropout = nn.Dropout(0.0)
    assert find_layout(mlp, "layers.0.mlp").name == "plain"
