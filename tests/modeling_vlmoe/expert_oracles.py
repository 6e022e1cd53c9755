"""Experts by loops too simple to be wrong, for what kernels and adapters are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from modeling_vlmoe import MoEConfig
from modeling_vlmoe.sparse_moe import SparseMoE
from tests import tiny


class GatedMLP(nn.Module):
    """gate, up and down, as most LLMs have."""

    def __init__(self, width: int = 16, middle: int = 24, act: str = "silu", bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, middle, bias=bias)
        self.up_proj = nn.Linear(width, middle, bias=bias)
        self.down_proj = nn.Linear(middle, width, bias=bias)
        self.act_fn = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class NormedMLP(GatedMLP):
    """BitNet's, with a norm before the last Linear."""

    def __init__(self, width: int = 16, middle: int = 24):
        super().__init__(width, middle)
        self.ffn_sub_norm = nn.RMSNorm(middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ffn_sub_norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class PlainMLP(nn.Module):
    """fc1 and fc2 with biases, as most ViTs have; of three widths, as a connector."""

    def __init__(self, width: int = 16, middle: int = 24, out: int = 12):
        super().__init__()
        self.fc1, self.fc2, self.activation_fn = nn.Linear(width, middle), nn.Linear(middle, out), ACT2FN["gelu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class LearntMLP(nn.Module):
    """An activation with weights of its own, without a gate."""

    def __init__(self, width: int = 16, middle: int = 24):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, middle, bias=False), nn.Linear(middle, width, bias=False)
        self.act_fn = nn.PReLU(middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class LimitedMLP(GatedMLP):
    """GLM-5's clamp and Falcon-H1's multiplier."""

    swiglu_limit, gate_multiplier = 0.5, 0.7


DENSE_MLPS = {
    "gated": GatedMLP,
    "gated with biases": lambda: GatedMLP(bias=True),
    "gated gelu": lambda: GatedMLP(act="gelu_pytorch_tanh"),
    "with a norm": NormedMLP,
    "plain of three widths": PlainMLP,
    "learnt activation": LearntMLP,
    "with a limit": LimitedMLP,
}


def block(mlp: nn.Module, seed: int = 0, **fields) -> SparseMoE:
    """A block of unlike experts in the place of an MLP, every parameter redrawn."""
    values = {"num_experts": 5, "num_experts_per_tok": 2} | fields
    if values.get("expert_type") == "delta":
        values = {"expert_rank": 3} | values
    made = SparseMoE(tiny.text_config("llama"), MoEConfig(**values), mlp, num_layers=1)
    tiny.redraw(made, seed)
    if not hasattr(made.experts, "deltas"):
        made.experts.config._experts_implementation_internal = "grouped_mm"
    return made


def route(num_tokens: int, num_experts: int, num_picked: int, seed: int = 0, dtype=torch.float32):
    """Weights (T, K) with a gradient, and experts (T, K)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype)
    weight, expert = logits.softmax(-1).topk(num_picked)
    return weight.requires_grad_(), expert


def stacks_of(experts) -> dict[str, Tensor]:
    """The weights and biases of every expert, (E, ...), of delta experts summed; differentiable."""
    if not hasattr(experts, "deltas"):
        return dict(experts.named_parameters(recurse=False))
    deltas = experts.deltas(None)
    made = {name: getattr(experts, name) + deltas[f"{name}_b"] @ deltas[f"{name}_a"] for name in experts.stacks}
    return made | {name: value for name, value in deltas.items() if name.endswith("_bias")}


def loop(experts, stacks: dict[str, Tensor], x: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Every token through every expert that it is sent to, one at a time."""
    up = experts.input_stack
    rows = []
    for token in range(len(x)):
        total = 0
        for expert, weight in zip(expert_TK[token].tolist(), weight_TK[token], strict=True):
            bias = [stacks[f"{name}_bias"][expert] if f"{name}_bias" in stacks else None for name in (up, "down_proj")]
            hidden = experts.activate(F.linear(x[token : token + 1], stacks[up][expert], bias[0]))
            total = total + weight * F.linear(hidden, stacks["down_proj"][expert], bias[1])
        rows.append(total)
    return torch.cat(rows)
