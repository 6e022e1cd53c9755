"""What every expert of a layer computes between its two products, whatever holds its weights.

Shapes: D model width, O output width, F expert width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .mlp_layouts import MLPLayout, find_activation, find_inner_norm, find_layout, in_features, is_biased, out_features


@dataclass(frozen=True)
class Autocast:
    """An autocast, to be on again in backward as it was in forward.

    Attributes:
        device_type: of the tensors.
        is_on: whether it was on.
        dtype: to what.
    """

    device_type: str
    is_on: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> "Autocast":
        """The one that is on for a device."""
        kind = device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    @classmethod
    def off(cls, device: torch.device) -> "Autocast":
        """None."""
        return cls(device.type, False, torch.get_autocast_dtype(device.type))

    def on(self) -> torch.autocast:
        """The context."""
        return torch.autocast(self.device_type, self.dtype, self.is_on)


@dataclass(frozen=True)
class Replay:
    """An activation that is run again in backward.

    Attributes:
        parts: what went in, gate and up or one: (rows, F) each.
        hidden: what came out, (rows, F), with its graph.
    """

    parts: tuple[Tensor, ...]
    hidden: Tensor

    def backward(self, gradient: Tensor, shared: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """From the gradient of what came out to that of what went in, side by side, and of those of the `shared`
        parameters that are trained.
        """
        trained = [one for one in shared if one.requires_grad]
        found = torch.autograd.grad(self.hidden, [*self.parts, *trained], gradient)
        rest = iter(found[len(self.parts) :])
        rows = torch.cat(found[: len(self.parts)], dim=-1) if len(self.parts) > 1 else found[0]
        return rows, [next(rest) if one.requires_grad else None for one in shared]


class ExpertMaths(nn.Module):
    """A dense MLP without its weights: layout, widths, biases, activation; and those of its weights that all experts
    share, which are its activation's and those of a norm before its last Linear.

    Args:
        dense_mlp: the MLP.
        intermediate_size: F, where it is not the dense MLP's.
        layout: the dense MLP's, where it is known.

    Raises:
        ValueError: if the MLP has a norm of another width inside.
    """

    def __init__(self, dense_mlp: nn.Module, intermediate_size: int | None = None, layout: MLPLayout | None = None):
        super().__init__()
        layout = find_layout(dense_mlp, "the dense MLP", layout)
        down: Any = dense_mlp.get_submodule(layout.down)
        self.is_gated, self.is_biased = layout.is_gated, is_biased(dense_mlp, layout)
        self.act_fn = find_activation(dense_mlp, "the dense MLP", layout)
        self.inner_norm = find_inner_norm(dense_mlp)
        self.gate_multiplier = getattr(dense_mlp, "gate_multiplier", None)  # Falcon-H1
        self.limit = getattr(dense_mlp, "swiglu_limit", None)  # GLM-5's ViT
        self.intermediate_size = intermediate_size or in_features(down)
        if self.inner_norm is not None and self.intermediate_size != in_features(down):
            raise ValueError(
                f"moe_intermediate_size is {self.intermediate_size}, but the dense MLP has a norm of width "
                f"{in_features(down)} before its last Linear. Leave moe_intermediate_size out."
            )
        num_rows = self.intermediate_size * (2 if self.is_gated else 1)
        # In the order of their names: PEFT numbers the adapters of a module in the order in which it finds weights,
        # which is this one, and of packed weights that of their names (0.21). An adapter is to fit both.
        self.weight_shapes: dict[str, tuple[int, int]] = {
            "down_proj": (out_features(down), self.intermediate_size),
            layout.input_stack: (num_rows, in_features(dense_mlp.get_submodule(layout.inputs[0]))),
        }

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the stacked weights, packed or not; biases are not among them."""
        return "down_proj", self.input_stack

    @property
    def input_stack(self) -> str:
        """The name of the weight that reads the MLP's input."""
        return "gate_up_proj" if self.is_gated else "up_proj"

    def dense_weights(self, dense_mlp: nn.Module, layout: MLPLayout) -> dict[str, Tensor]:
        """What one expert that is the dense MLP holds, weights and biases, by their names.

        Raises:
            ValueError: if the experts are not as wide as the dense MLP, naming both widths.
        """
        dense_width = in_features(dense_mlp.get_submodule(layout.down))
        if self.intermediate_size != dense_width:
            raise ValueError(
                f"moe_intermediate_size is {self.intermediate_size}, but the dense MLP is {dense_width} wide; a copy "
                "keeps the width. Leave moe_intermediate_size out."
            )
        found = {}
        for name, sources in layout.expert_sources(self.is_biased).items():
            tensors = [dense_mlp.get_parameter(source) for source in sources]
            found[name] = torch.cat([one.mT if layout.is_transposed and one.ndim == 2 else one for one in tensors])
        return found

    def combine(self, gate: Tensor, up: Tensor) -> Tensor:
        """From gate and up, (rows, F) each, to (rows, F), as the dense MLP does it."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.gate_multiplier is not None:
            gate = gate * self.gate_multiplier
        hidden = self.act_fn(gate) * up
        return hidden if self.inner_norm is None else self.inner_norm(hidden)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """From (rows, 2F) to (rows, F); the host's kernels call it."""
        return self.combine(*gate_up.chunk(2, dim=-1))

    def activate(self, rows: Tensor) -> Tensor:
        """What follows the first product, (rows, 2F) or (rows, F), before the second: (rows, F)."""
        return self._apply_gate(rows) if self.is_gated else self.act_fn(rows)

    def activate_as(self, rows: Tensor, autocast: Autocast) -> Tensor:
        """The same under an autocast, in the rows' dtype: a learnt activation or a norm may give another."""
        with autocast.on():
            return self.activate(rows).to(rows.dtype)

    def replay(self, rows: Tensor, autocast: Autocast) -> "Replay":
        """Activates rows, (rows, 2F) or (rows, F), again, for a gradient."""
        parts = rows.chunk(2, dim=-1) if self.is_gated else (rows,)
        parts = tuple(part.detach().requires_grad_() for part in parts)
        with torch.enable_grad(), autocast.on():
            # Views: hooks that somebody puts on all modules (torch's FlopCounterMode) cannot be on leaves in here.
            seen = [part.view_as(part) for part in parts]
            hidden = self.combine(*seen) if self.is_gated else self.act_fn(*seen)
            return Replay(parts, hidden.to(rows.dtype))

    def shared_parameters(self) -> list[nn.Parameter]:
        """The weights that all experts share: of a learnt activation, of a norm."""
        shared = [module for module in (self.act_fn, self.inner_norm) if isinstance(module, nn.Module)]
        return [parameter for module in shared for parameter in module.parameters()]
