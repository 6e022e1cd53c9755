"""Which kernel runs experts with weights of their own.

The host's, by the name that the configuration gives, but for two cases on a CPU (torch 2.13, transformers 5.23):

- Half precision under `grouped_mm`: oneDNN builds a kernel for every number of rows that it has not seen, so routing
  that is new with every batch costs twice what fixed routing costs. Here rows are rounded up.
- `batched_mm` copies a weight for every token and expert, which soon are gigabytes.

Experts with an adapter's pairs beside their weights (see routed_lora.py) run by a kernel of ours, whatever the name.
Compilers, expert parallelism and sharded or packed weights always get the host's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from .adapted_experts import run_pairs
from .expert_paths import HALF
from .grouped_experts import full_experts, run_grouped
from .hollow_tensors import device_type, is_hollow
from .shared_base import LowRank

FEW_TOKENS = 4  # up to here there are few row counts, which oneDNN has soon seen
HOLLOW = ("grouped_mm", "batched_mm")
MOST_COPIED = 2**24  # bytes of weights that `batched_mm` may copy


def is_plain(experts: Any) -> bool:
    """Whether experts are whole plain tensors that a kernel of ours may read by themselves."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if experts._is_expert_parallel or is_parametrized(experts):
        return False
    # A sharded or quantized tensor is of a class of its own.
    tensors = [getattr(experts, name).data for name in experts.stacks]
    return all(type(tensor) is Tensor or is_hollow(tensor) for tensor in tensors)


def takes_rounded(experts: Any, hidden_states: Tensor, top_k_index: Tensor) -> bool:
    """Whether the host's kernel would be slow for these tokens, (T, D), and experts, (T, K)."""
    implementation = experts.config._experts_implementation
    if device_type(hidden_states) != "cpu" or implementation not in ("grouped_mm", "batched_mm"):
        return False
    if not is_plain(experts):
        return False
    if implementation == "grouped_mm":
        return len(hidden_states) > FEW_TOKENS and experts.down_proj.dtype in HALF
    stacks = [getattr(experts, name) for name in experts.stacks]
    copied = sum(stack[0].numel() * stack.element_size() for stack in stacks) * top_k_index.numel()
    return copied > MOST_COPIED


class ExpertKernels(ExpertsInterface):
    """The host's kernels by name, with a detour where they are slow."""

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        """As the host's; a kernel takes (experts, (T, D), (T, K), (T, K)), and as `pairs` what is beside
        the experts' weights, by their names; it gives (T, O).

        Raises:
            KeyError: for a name that no kernel has.
        """
        kernel = ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)
        # Those that tensors without numbers go through; the others ask which tokens go where.
        hollow_name = experts_implementation if experts_implementation in HOLLOW else "grouped_mm"
        hollow_kernel = ALL_EXPERTS_FUNCTIONS.get_interface(hollow_name, default)

        def run(
            experts: Any,
            hidden_states: Tensor,
            top_k_index: Tensor,
            top_k_weights: Tensor,
            pairs: dict[str, LowRank] | None = None,
        ) -> Tensor:
            if pairs:
                return run_pairs(experts, pairs, hidden_states, top_k_index, top_k_weights)
            if takes_rounded(experts, hidden_states, top_k_index):
                return run_grouped(full_experts(experts), hidden_states, top_k_index, top_k_weights)
            chosen = hollow_kernel if is_hollow(hidden_states) else kernel
            return chosen(experts, hidden_states, top_k_index, top_k_weights)

        return run


EXPERT_KERNELS = ExpertKernels()
