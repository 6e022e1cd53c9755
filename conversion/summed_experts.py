"""Delta experts as an oracle: their weights summed, and a plain loop."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vlmoe.delta_experts import DeltaExperts


class SummedExperts(nn.Module):
    """Delta experts by the plain loop over their summed weights, one expert at a time.

    Args:
        experts: the delta experts.
        dtype: what sums are rounded to, as whole experts are written.
    """

    def __init__(self, experts: DeltaExperts, dtype: torch.dtype):
        super().__init__()
        self.experts, self.dtype, self.num_experts = experts, dtype, experts.num_experts

    def weight(self, name: str, expert: int) -> Tensor:
        a, b = (getattr(self.experts.deltas, f"{name}_{pair}")[expert] for pair in "ab")
        return (getattr(self.experts, name).float() + b.float() @ a.float()).to(self.dtype).float()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        up, deltas = self.experts.input_stack, self.experts.deltas
        out = hidden_states.new_zeros(hidden_states.shape[0], self.experts.down_proj.shape[0])
        for expert in range(self.num_experts):
            token, pick = torch.where(top_k_index == expert)
            biases = [getattr(deltas, f"{name}_bias", None) for name in (up, "down_proj")]
            up_bias, down_bias = (None if bias is None else bias[expert] for bias in biases)
            hidden = self.experts.activate(F.linear(hidden_states[token], self.weight(up, expert), up_bias))
            hidden = F.linear(hidden, self.weight("down_proj", expert), down_bias)
            out = out.index_add(0, token, hidden * top_k_weights[token, pick, None])
        return out
