"""The sparse Mixture-of-Experts block: a router and a stack of experts in the place of a dense MLP, and where asked
for a shared expert, a dense MLP that sees every token.

Invariant: with `norm_topk_prob` the routing weights of a token sum to one, so experts that are copies of the dense MLP
compute the dense MLP, whatever the router (Sparse Upcycling, 2212.05055; MATHS 1).

Shapes: T tokens, D model width, O output width (D but for the connector), F expert width, E experts, K experts per
    token.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from .delta_experts import DeltaExperts
from .expert_choice import add_rows, chooses_tokens, with_images
from .expert_kernels import EXPERT_KERNELS, takes_rounded
from .expert_maths import ExpertMaths
from .mlp_layouts import (
    MLPLayout,
    adds_residual,
    find_inner_norm,
    find_layout,
    in_features,
    out_features,
    output_dropout,
)
from .moe_config import experts_in
from .part_requests import PartRequest
from .routed_lora import run_experts
from .router_losses import RouterContext, RouterLosses
from .routers import Router
from .shared_base import LowRank


@use_experts_implementation(experts_interface=EXPERT_KERNELS)
class Experts(ExpertMaths):
    """A dense MLP, E times: `gate_up_proj (E, 2F, D)` or `up_proj (E, F, D)`, `down_proj (E, O, F)`, and
    `<name>_bias`.

    Args:
        config: the configuration whose `experts_implementation` chooses the kernel.
        num_experts: E.
        dense_mlp: gives layout, widths, biases and activation; its weights are not kept, but those of its activation
            and of a norm before its last Linear are, which all experts share.
        intermediate_size: F, where it is not the dense MLP's.
        layout: the dense MLP's, where it is known.

    Attributes:
        lora_dropout: probability of the dropout that an adapter on the weights has in training (see routed_lora.py).
    """

    gate_up_proj: Tensor
    gate_up_proj_bias: Tensor
    up_proj: Tensor
    up_proj_bias: Tensor
    down_proj: Tensor
    down_proj_bias: Tensor
    lora_dropout: float = 0.0
    # Set by the decorator, and read by the host's kernels.
    config: Any
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    _is_expert_parallel: bool

    def __init__(
        self,
        config: PreTrainedConfig,
        num_experts: int,
        dense_mlp: nn.Module,
        intermediate_size: int | None = None,
        layout: MLPLayout | None = None,
    ):
        layout = find_layout(dense_mlp, "the dense MLP", layout)
        super().__init__(dense_mlp, intermediate_size, layout)
        down: Any = dense_mlp.get_submodule(layout.down)
        self.num_experts = num_experts
        shapes: dict[str, tuple[int, ...]] = dict(self.weight_shapes)
        if self.is_biased:
            shapes |= {f"{name}_bias": self.weight_shapes[name][:1] for name in (self.input_stack, "down_proj")}
        for name, shape in shapes.items():
            tensor = torch.empty(num_experts, *shape, dtype=down.weight.dtype, device=down.weight.device)
            self.register_parameter(name, nn.Parameter(tensor))

    def reset_parameters(self, std: float) -> None:
        """Normal weights, zero biases."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    @torch.no_grad()
    def copy_dense(self, dense_mlp: nn.Module, layout: MLPLayout) -> None:
        """Makes each expert the dense MLP, biases too (MATHS 2, *copy*).

        Raises:
            ValueError: if the experts are not as wide as the dense MLP.
        """
        for name, weight in self.dense_weights(dense_mlp, layout).items():
            getattr(self, name).copy_(weight)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        pairs: dict[str, LowRank] | None = None,
    ) -> Tensor:
        """The plain loop over experts: the reference that the host's kernels are compared with.

        Args:
            hidden_states: (T, D).
            top_k_index: chosen experts, (T, K).
            top_k_weights: their weights, (T, K).
            pairs: what an adapter has beside their weights, by their names; the loop itself is never given any (see
                expert_kernels.py).

        Returns:
            (T, O).
        """
        input_stack = self.gate_up_proj if self.is_gated else self.up_proj
        input_bias = (self.gate_up_proj_bias if self.is_gated else self.up_proj_bias) if self.is_biased else None
        out = hidden_states.new_zeros(hidden_states.shape[0], self.down_proj.shape[1])
        for expert in range(self.num_experts):
            token, pick = torch.where(top_k_index == expert)
            h = F.linear(hidden_states[token], input_stack[expert], None if input_bias is None else input_bias[expert])
            h = self.activate(h)
            h = F.linear(h, self.down_proj[expert], self.down_proj_bias[expert] if self.is_biased else None)
            out = out.index_add(0, token, (h * top_k_weights[token, pick, None]).to(out.dtype))
        return out


ALIGNMENT = 8  # grouped_mm wants rows of a multiple of 16 bytes


def _aligned(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


class _WidenedExperts:
    """What a host kernel reads from experts.

    Input and output widened by zeros to one width, and every width aligned.
    """

    def __init__(self, experts: Experts):
        self.config, self.num_experts, self.act_fn = experts.config, experts.num_experts, experts.act_fn
        self.has_gate, self.has_bias = experts.has_gate, experts.has_bias
        self.has_post_expert_norm, self._is_expert_parallel = experts.has_post_expert_norm, experts._is_expert_parallel
        self.is_transposed, self.is_concatenated = experts.is_transposed, experts.is_concatenated
        self.experts = experts
        _, width_out, expert_width = experts.down_proj.shape
        stack = experts.gate_up_proj if experts.has_gate else experts.up_proj
        width_in, halves = stack.shape[-1], stack.shape[1] // expert_width
        self.width = _aligned(max(width_in, width_out))
        more, more_out = _aligned(expert_width) - expert_width, self.width - width_out
        num_experts = stack.shape[0]
        stack = F.pad(stack.view(num_experts, halves, expert_width, width_in), (0, self.width - width_in, 0, more))
        stack = stack.flatten(1, 2)
        self.down_proj = F.pad(experts.down_proj, (0, more, 0, more_out))
        bias = None
        if experts.has_bias:
            bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
            bias = F.pad(bias.view(num_experts, halves, expert_width), (0, more)).flatten(1, 2)
            self.down_proj_bias = F.pad(experts.down_proj_bias, (0, more_out))
        if experts.has_gate:
            self.gate_up_proj, self.gate_up_proj_bias = stack, bias
        else:
            self.up_proj, self.up_proj_bias = stack, bias

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self.experts.inner_norm is None:
            return self.experts._apply_gate(gate_up)
        width = self.experts.intermediate_size  # the norm is not to see the zeros
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = self.experts._apply_gate(torch.cat([gate[..., :width], up[..., :width]], dim=-1))
        return F.pad(hidden, (0, gate.shape[-1] - width))


class PaddedExperts(Experts):
    """Experts whose widths the host's kernels do not take as they are.

    Their output may be wider or narrower than their input, as in the connector (the kernels take its width from the
    input), or a width may not be aligned. The kernels are given tensors widened with zeros; what is stored is not.
    """

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        pairs: dict[str, LowRank] | None = None,
    ) -> Tensor:
        """As `Experts.forward`, by the implementation that the configuration names."""
        if pairs or self.config._experts_implementation == "eager" or takes_rounded(self, hidden_states, top_k_index):
            return super().forward(hidden_states, top_k_index, top_k_weights, pairs=pairs)  # any width will do
        kernel = ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, Experts.forward)
        widened = _WidenedExperts(self)
        hidden_states = F.pad(hidden_states, (0, widened.width - hidden_states.shape[-1]))
        return kernel(widened, hidden_states, top_k_index, top_k_weights)[:, : self.down_proj.shape[1]]


def build_shared_expert(dense_mlp: nn.Module, layout: MLPLayout, width: int) -> nn.Module:
    """A dense MLP of the same kind and of this width, with new weights.

    Raises:
        ValueError: if the dense MLP is no module of its own, or does more than an MLP.
    """
    is_own_module = layout.block is None and not any("." in name for name in layout.linears)
    if not is_own_module or adds_residual(dense_mlp, layout) or find_inner_norm(dense_mlp) is not None:
        raise ValueError(
            f"num_shared_experts is 1, but the dense MLP ({type(dense_mlp).__name__}, {layout}) cannot be built at "
            "another place or width: it is spread over its layer, adds the residual, or holds a norm. Leave "
            "num_shared_experts out."
        )
    shared = copy.deepcopy(dense_mlp)
    for name in layout.linears:
        dense: Any = getattr(dense_mlp, name)
        is_down = name == layout.down
        rows = out_features(dense) if is_down else width * (2 if name == layout.gate_up else 1)
        like: dict[str, Any] = {
            "bias": dense.bias is not None,
            "dtype": dense.weight.dtype,
            "device": dense.weight.device,
        }
        setattr(shared, name, nn.Linear(width if is_down else in_features(dense), rows, **like))
    return shared


class SparseMoE(nn.Module):
    """`router` + `experts`, in the place of a dense MLP.

    With a shared expert, `shared_expert` is a dense MLP whose output, weighted by the sigmoid of `shared_expert_gate`,
    is added to the routed one, as in Qwen2-MoE (transformers' `Qwen2MoeSparseMoeBlock`, whose names these are).

    Args:
        config: the configuration whose `experts_implementation` chooses the kernel.
        moe: the part's `MoEConfig`.
        dense_mlp: the MLP whose place it takes; gives layout, widths, biases and activation.
        num_layers: sparse layers of the part.
        layout: the dense MLP's, where it is known.
        position: the how-manyth of these layers it is in.
        text_width: width of the LLM's word embeddings, which some routers read.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        moe: Any,
        dense_mlp: nn.Module,
        num_layers: int,
        layout: MLPLayout | None = None,
        position: int = 0,
        text_width: int | None = None,
    ):
        super().__init__()
        self.moe = moe  # the router may be wrapped by an adapter
        layout = find_layout(dense_mlp, "the dense MLP", layout)
        down: Any = dense_mlp.get_submodule(layout.down)
        width = in_features(dense_mlp.get_submodule(layout.inputs[0]))
        widths = (width, moe.moe_intermediate_size or in_features(down))
        is_regular = width == out_features(down) and all(one == _aligned(one) for one in widths)
        experts_class = Experts if is_regular else PaddedExperts
        experts: Any
        if moe.expert_type == "delta":
            experts = DeltaExperts(moe, dense_mlp, layout, experts_in(moe, position))
        else:
            experts = experts_class(config, experts_in(moe, position), dense_mlp, moe.moe_intermediate_size, layout)
            # The host's decorator sets these two after __init__, per class; here they differ per instance.
            experts.has_gate, experts.has_bias = experts.is_gated, experts.is_biased
        self.experts = experts
        self.router = Router(width, moe, position, text_width).to(self.experts.down_proj.device)
        self.shared_expert: nn.Module | None = None
        if moe.num_shared_experts:
            shared_width = moe.shared_expert_intermediate_size or self.experts.intermediate_size
            self.shared_expert = build_shared_expert(dense_mlp, layout, shared_width)
            like: dict[str, Any] = {"dtype": down.weight.dtype, "device": down.weight.device}
            self.shared_expert_gate = nn.Linear(width, 1, bias=False, **like)
        self.losses = RouterLosses(num_layers)
        self.context: RouterContext | None = None
        self.request: PartRequest | None = None  # of a connector in a class of the host's
        # What the dense MLP does to its result.
        self.multiplier = getattr(dense_mlp, "down_multiplier", None)  # Falcon-H1
        self.output_dropout = nn.Dropout(output_dropout(dense_mlp, layout))

    def routed(self, hidden_states: Tensor, context: RouterContext | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Maps (..., D) to (..., O); the detached router logits (T, E) and, in training, the (balance, z) losses come
        along.
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        if chooses_tokens(self.moe):
            context = with_images(context, hidden_states.shape)
        logits_TE, weight_TK, expert_TK, *token_R = self.router(x_TD, context)
        is_trained = any(parameter.requires_grad for parameter in self.router.parameters())
        logits_TE, weight_TK, losses = self.losses(logits_TE, weight_TK, expert_TK, context, is_trained, self.moe)
        if token_R:  # weights and experts are of rows, not of tokens
            out_RO = run_experts(self.experts, x_TD[token_R[0]], expert_TK, weight_TK)
            out_TO = add_rows(out_RO, token_R[0], len(x_TD))
        else:
            out_TO = run_experts(self.experts, x_TD, expert_TK, weight_TK)
        if self.multiplier is not None:
            out_TO = out_TO * self.multiplier
        out_TO = self.output_dropout(out_TO)
        out = out_TO.reshape(*hidden_states.shape[:-1], out_TO.shape[-1])
        if self.shared_expert is not None:
            out = out + torch.sigmoid(self.shared_expert_gate(hidden_states)) * self.shared_expert(hidden_states)
        return out, logits_TE, losses

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        context: RouterContext | None = None,
        returns_routing: bool = False,
    ) -> Any:
        """Maps (..., D) to (..., O), as the dense MLP did; where that was given a residual, it is added. With
        `returns_routing` it is `routed` in this context: called as a module, whose weights FSDP and ZeRO-3 gather.
        """
        if returns_routing:
            return self.routed(hidden_states, context)
        if (request := self.request) is None:
            out = self.routed(hidden_states, self.context)[0]
        else:
            out, logits, losses = self.routed(hidden_states, request.context)
            request.take((logits,), (losses,))
        return out if residual is None else out + residual
