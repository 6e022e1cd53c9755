"""Experts that share one base: the dense MLP's weights, and a pair of low rank per expert beside each of them (DeRS,
2503.01359; MATHS 2, *delta*).

Invariant: a new pair's `b` is zero, so new experts are the base, for any router. Their checkpoint has about the dense
model's size, and a step about its price (see shared_base.py).

They are not under the host's `use_experts_implementation`: its kernels read stacks of whole experts, so
`set_experts_implementation` has no effect on them.

Shapes: T tokens, D model width, O output width, F expert width, R = 2F (gated) or F, E experts, r rank.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .expert_maths import ExpertMaths
from .mlp_layouts import MLPLayout, find_layout
from .moe_config import PARTS
from .shared_base import LowRank, SharedBase, run_shared_base

DENSIFY = "vlmoe densify CHECKPOINT --output-dir OUT"


class Deltas(nn.Module):
    """What experts have of their own: `<weight>_a (E, r, columns)`, `<weight>_b (E, rows, r)` and, where the dense MLP
    has biases, `<weight>_bias (E, rows)`.

    A module of its own, so that PEFT's `modules_to_save` can train and save just this.

    Args:
        weights: the base's, by name.
        num_experts: E.
        rank: r.
        is_biased: whether the dense MLP has biases.
    """

    def __init__(self, weights: dict[str, Tensor], num_experts: int, rank: int, is_biased: bool):
        super().__init__()
        for name, weight in weights.items():
            rows, columns = weight.shape
            shapes: dict[str, tuple[int, ...]] = {
                f"{name}_a": (num_experts, rank, columns),
                f"{name}_b": (num_experts, rows, rank),
            }
            if is_biased:
                shapes[f"{name}_bias"] = (num_experts, rows)
            for delta, shape in shapes.items():
                made = torch.empty(shape, dtype=weight.dtype, device=weight.device)
                self.register_parameter(delta, nn.Parameter(made))

    def reset_parameters(self) -> None:
        """`a` as LoRA draws it, uniform with variance 1 / (3 columns) (2106.09685); `b` and biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("_a"):
                bound = parameter.shape[-1] ** -0.5
                init.uniform_(parameter, -bound, bound)
            else:
                init.zeros_(parameter)

    def forward(self, *args: Any) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self.named_parameters())


class DeltaExperts(ExpertMaths):
    """E experts around one base: `gate_up_proj (2F, D)` or `up_proj (F, D)`, `down_proj (O, F)`, and `deltas`.

    Args:
        moe: the part's `MoEConfig`: `num_experts`, `expert_rank`, `train_expert_base`.
        dense_mlp: gives layout, widths, biases and activation, as for `Experts`.
        layout: the dense MLP's, where it is known.
        num_experts: of this layer, where layers differ in it.

    Raises:
        ValueError: if the rank is larger than a side of the weights, or the dense MLP is none that experts can be.
    """

    gate_up_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor

    def __init__(
        self, moe: Any, dense_mlp: nn.Module, layout: MLPLayout | None = None, num_experts: int | None = None
    ):
        layout = find_layout(dense_mlp, "the dense MLP", layout)
        super().__init__(dense_mlp, moe.moe_intermediate_size, layout)
        down: Any = dense_mlp.get_submodule(layout.down)
        self.num_experts, self.rank = num_experts or moe.num_experts, moe.expert_rank
        self.is_base_trained = moe.train_expert_base
        if self.rank > (most := min(side for shape in self.weight_shapes.values() for side in shape)):
            raise ValueError(
                f"expert_rank is {self.rank}, but a weight of the experts has a side of {most}: a rank above that "
                "adds nothing. Choose a smaller one."
            )
        for name, shape in self.weight_shapes.items():
            weight = torch.empty(shape, dtype=down.weight.dtype, device=down.weight.device)
            self.register_parameter(name, nn.Parameter(weight))
        bases = {name: getattr(self, name) for name in self.weight_shapes}
        self.deltas = Deltas(bases, self.num_experts, self.rank, self.is_biased)
        self.freeze_base()

    def freeze_base(self) -> None:
        """Keeps the base from being trained, where the configuration says so."""
        if not self.is_base_trained:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)

    def reset_parameters(self, std: float) -> None:
        """A base of normal weights; its pairs initialise themselves."""
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, mean=0.0, std=std)

    @torch.no_grad()
    def copy_dense(self, dense_mlp: nn.Module, layout: MLPLayout) -> None:
        """Makes the dense MLP the base, and each expert equal to it.

        Raises:
            ValueError: if the experts are not as wide as the dense MLP.
        """
        weights = self.dense_weights(dense_mlp, layout)
        self.deltas.reset_parameters()
        for name, weight in weights.items():
            getattr(self.deltas if name.endswith("_bias") else self, name).copy_(weight)

    def base(self) -> SharedBase:
        """The experts as the kernel takes them."""
        deltas: dict[str, Tensor] = self.deltas(None)  # called: PEFT may have put a copy of it in its place
        up, down = self.input_stack, "down_proj"
        up_pair, down_pair = (LowRank(deltas[f"{name}_a"], deltas[f"{name}_b"]) for name in (up, down))
        up_bias, down_bias = (deltas.get(f"{name}_bias") for name in (up, down))
        weights = getattr(self, up), self.down_proj
        return SharedBase(self, self.num_experts, *weights, up_pair, down_pair, up_bias, down_bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `Experts.forward`.

        Args:
            hidden_states: (T, D).
            top_k_index: chosen experts, (T, K).
            top_k_weights: their weights, (T, K).

        Returns:
            (T, O).
        """
        return run_shared_base(self.base(), hidden_states, top_k_index, top_k_weights)


def delta_experts(model: nn.Module) -> list[tuple[str, DeltaExperts]]:
    """A model's delta experts, with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, DeltaExperts)]


def refuse_delta_experts(model: nn.Module, what: str) -> None:
    """Refuses what takes whole experts only.

    Args:
        model: the model.
        what: what takes them, the beginning of a sentence.

    Raises:
        ValueError: naming the first delta experts.
    """
    if found := delta_experts(model):
        more = f" (and {len(found) - 1} others)" if len(found) > 1 else ""
        raise ValueError(
            f"{what} needs experts with weights of their own, but {found[0][0]}{more} are delta experts, which share "
            f"their base. Make whole experts of them first: {DENSIFY}."
        )


def refuse_split_deltas(model: nn.Module, distributed_config: Any) -> None:
    """Refuses to split delta experts over processes; FSDP, which shards and gathers, is welcome.

    Raises:
        ValueError: under tensor or expert parallelism.
    """
    asked = {
        "Tensor parallelism": (distributed_config.tp_size or 1) > 1 or bool(distributed_config.tp_plan),
        "Expert parallelism": (distributed_config.ep_size or 1) > 1,
    }
    for what, is_asked in asked.items():
        if is_asked:
            refuse_delta_experts(model, what)


def freeze_bases(model: nn.Module) -> None:
    """Keeps the bases of a model's delta experts from being trained where its configuration says so: loading makes
    every weight a trained one (transformers 5.23).
    """
    for _, experts in delta_experts(model):
        experts.freeze_base()


def refuse_delta_config(config: Any, what: str, parts: Iterable[str] = PARTS) -> None:
    """As `refuse_delta_experts`, from a configuration alone, of these parts."""
    found = [part for part in parts if getattr(config.moe(part), "expert_type", "") == "delta"]
    if found:
        raise ValueError(
            f"{what} needs experts with weights of their own, but those of {', '.join(found)} are delta experts, "
            f"which share their base. Make whole experts of them first: {DENSIFY}."
        )
