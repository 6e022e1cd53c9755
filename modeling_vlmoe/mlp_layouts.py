"""How a dense MLP is written in transformers' backbones, and how its tensors become one stack of experts.

A dense MLP is recognised by the names of its Linear children, never by `model_type`. A new spelling is a new row of
`LAYOUTS`. Whatever the source, experts are stored un-transposed as `gate_up_proj (E, 2F, D)` or `up_proj (E, F, D)`,
`down_proj (E, D, F)` and `<name>_bias (E, rows)`: E experts, F expert width, D model width.

    >>> find_layout(llama.layers[0].mlp, "layers.0.mlp").expert_sources(is_biased=False)
    {'gate_up_proj': ('gate_proj.weight', 'up_proj.weight'), 'down_proj': ('down_proj.weight',)}
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MLP_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block", "ff")
ACTIVATION_NAMES = (
    "act_fn",
    "activation_fn",
    "act",
    "activation",
    "gelu_impl",
    "intermediate_act_fn",
    "1",  # of an `nn.Sequential`
)
# A norm between the activation and the last Linear (BitNet); every expert has the same one.
INNER_NORM_NAMES = ("ffn_sub_norm",)
# Dropout on what the MLP gives, a module or a probability.
DROPOUT_NAMES = ("dropout", "hidden_dropout", "residual_dropout")
# Dropout elsewhere, where the MLP computes it by a function.
INNER_DROPOUT_NAMES = ("activation_dropout",)
# Attributes by which an MLP computes more than experts do, and the values that mean that it does not.
UNKNOWN_MATHS = {"activation_sparsity": (0, 0.0, None), "use_clipped_linears": (False, None)}
LINEARS = (nn.Linear, Conv1D)
RESIDUAL = "residual"


@dataclass(frozen=True)
class MLPLayout:
    """The names of a dense MLP's Linear children.

    Attributes:
        name: what error messages call this spelling.
        down: the Linear from expert width back to model width.
        up: the Linear to expert width; None where it is fused with the gate.
        gate: the gate's Linear; None where there is no gate or where it is fused.
        gate_up: one Linear of 2F rows, gate first; None where they are apart.
        is_transposed: whether its Linears are `Conv1D`, which store (in, out).
        activation: what its code computes where no attribute names it.
        has_dropout: whether `DROPOUT_NAMES` stand for dropout on its result.
        block: set where a layer has no module for its MLP: the child in whose place the experts go. The other names
            are then those of the layer's descendants.
    """

    name: str
    down: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None
    is_transposed: bool = False
    activation: Callable[[Tensor], Tensor] | None = None
    has_dropout: bool = False
    block: str | None = None

    @property
    def is_gated(self) -> bool:
        return self.gate is not None or self.gate_up is not None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The Linears that read the MLP's input, in the row order of the stacked tensor."""
        return tuple(name for name in (self.gate_up, self.gate, self.up) if name is not None)

    @property
    def linears(self) -> frozenset[str]:
        return frozenset((*self.inputs, self.down))

    @property
    def input_stack(self) -> str:
        """The name of the experts' stacked input projection."""
        return "gate_up_proj" if self.is_gated else "up_proj"

    def expert_sources(self, is_biased: bool) -> dict[str, tuple[str, ...]]:
        """For each tensor of one expert: the dense tensors that make it, concatenated along their first dimension
        (weights of a transposed layout are transposed first).
        """
        sources = {
            self.input_stack: tuple(f"{name}.weight" for name in self.inputs),
            "down_proj": (f"{self.down}.weight",),
        }
        if is_biased:
            sources |= {
                f"{self.input_stack}_bias": tuple(f"{name}.bias" for name in self.inputs),
                "down_proj_bias": (f"{self.down}.bias",),
            }
        return sources

    def source_path(self, path: str) -> str:
        """What the names of this layout's Linears begin with, from the path of the experts in their place."""
        return path.rpartition(".")[0] if self.block else path

    def __str__(self) -> str:
        return f"{self.name} ({', '.join((*self.inputs, self.down))})"


LAYOUTS = (
    MLPLayout("gated", gate="gate_proj", up="up_proj", down="down_proj", has_dropout=True),
    MLPLayout("gated, wrapped", gate="gate_proj.linear", up="up_proj.linear", down="down_proj.linear"),
    MLPLayout("gated, fused", gate_up="gate_up_proj", down="down_proj"),
    MLPLayout("plain", up="fc1", down="fc2"),
    MLPLayout("plain, gated and fused", gate_up="fc1", down="fc2"),  # told from "plain" by its rows
    MLPLayout("connector", up="linear_1", down="linear_2"),
    MLPLayout("up and down", up="up_proj", down="down_proj", has_dropout=True),
    MLPLayout("numbered", gate="w1", up="w3", down="w2", activation=F.silu),
    MLPLayout("transposed", up="c_fc", down="c_proj", is_transposed=True, has_dropout=True),
    MLPLayout("c_fc", up="c_fc", down="c_proj", has_dropout=True),
    MLPLayout("fc_in", up="fc_in", down="fc_out", has_dropout=True),
    MLPLayout("h to 4h", up="dense_h_to_4h", down="dense_4h_to_h", has_dropout=True),
    MLPLayout("Wi, gated and fused", gate_up="Wi", down="Wo"),
    MLPLayout("proj_up", gate="proj_up_gate", up="proj_up", down="proj_down"),
    MLPLayout("proj_up, fused", gate_up="proj_up_gate_z", down="proj_down"),
    MLPLayout("linear_fc", up="linear_fc1", down="linear_fc2"),
    MLPLayout("lin", up="lin1", down="lin2"),
    MLPLayout("sequential", up="0", down="2"),
    MLPLayout("in the layer", up="fc1", down="fc2", block="fc1"),
    MLPLayout("in the projector", up="linear_1", down="linear_2", block="linear_1"),
    MLPLayout("in the merger", up="linear_fc1", down="linear_fc2", block="linear_fc1"),
    MLPLayout("intermediate and output", up="intermediate.dense", down="output.dense", block="intermediate"),
)


def out_features(linear: nn.Module) -> int:
    """The width that a Linear or a `Conv1D` gives."""
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features  # type: ignore[return-value]


def in_features(linear: nn.Module) -> int:
    """The width that a Linear or a `Conv1D` reads."""
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features  # type: ignore[return-value]


def _probability(dropout: Any) -> float:
    """Of a dropout module, or of a number that says it."""
    return float(getattr(dropout, "p", dropout) or 0.0)


def _is_inert(module: nn.Module) -> bool:
    """Whether a child of the MLP computes nothing, so that experts may leave it out."""
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _root(mlp: nn.Module, layout: MLPLayout) -> nn.Module:
    """The module whose children surround the first Linear: the MLP, or what takes its place in the layer."""
    return mlp if layout.block in (None, layout.up) else mlp.get_submodule(layout.block or "")


def find_activation(mlp: nn.Module, where: str, layout: MLPLayout | None = None) -> Callable:
    """The MLP's activation; a module is kept as it is, since it may have parameters.

    Raises:
        ValueError: if none of the known attribute names is there.
    """
    root = mlp if layout is None else _root(mlp, layout)
    for name in ACTIVATION_NAMES:
        if callable(activation := getattr(root, name, None)):
            return activation
    if layout is not None and layout.activation is not None:
        return layout.activation
    raise ValueError(
        f"{where} ({type(mlp).__name__}) has no activation under any of the names {', '.join(ACTIVATION_NAMES)}; "
        "experts cannot repeat it. Leave this layer out of `layers`."
    )


def find_inner_norm(mlp: nn.Module) -> nn.Module | None:
    """The norm between activation and last Linear, where there is one."""
    return next((norm for name in INNER_NORM_NAMES if (norm := getattr(mlp, name, None)) is not None), None)


def output_dropout(mlp: nn.Module, layout: MLPLayout) -> float:
    """The probability of the dropout on the MLP's result."""
    if not layout.has_dropout:
        return 0.0
    return max(_probability(getattr(mlp, name, None)) for name in DROPOUT_NAMES)


def adds_residual(mlp: nn.Module, layout: MLPLayout) -> bool:
    """Whether the MLP is given the residual beside its input, and adds it (BLOOM, MPT)."""
    return layout.block is None and RESIDUAL in inspect.signature(type(mlp).forward).parameters


def run_dense(mlp: nn.Module, layout: MLPLayout, hidden_states: Tensor) -> Tensor:
    """What a dense MLP makes of hidden states, (..., D), without the residual."""
    if layout.block is not None:
        up, down = (mlp.get_submodule(name) for name in (*layout.inputs, layout.down))
        return down(find_activation(mlp, layout.block, layout)(up(hidden_states)))
    if adds_residual(mlp, layout):
        return mlp(hidden_states, hidden_states.new_zeros(()))
    return mlp(hidden_states)


def _linear_names(mlp: nn.Module) -> frozenset[str]:
    return frozenset(name for name, child in mlp.named_modules() if isinstance(child, LINEARS))


def _matches(layout: MLPLayout, mlp: nn.Module) -> bool:
    """Whether a module has just the Linears of a layout, of its kind and with its rows."""
    if layout.block is not None or layout.linears != _linear_names(mlp):
        return False
    down = mlp.get_submodule(layout.down)
    rows = in_features(down) * (2 if layout.gate_up is not None else 1)
    first = mlp.get_submodule(layout.inputs[0])
    return isinstance(down, Conv1D) == layout.is_transposed and out_features(first) == rows


def find_spread_layout(layer: nn.Module) -> MLPLayout | None:
    """The layout of a layer whose MLP is not one module but several of its children; None where it has no such."""
    children = dict(layer.named_modules())
    for layout in LAYOUTS:
        if layout.block is None or not all(isinstance(children.get(name), LINEARS) for name in layout.linears):
            continue
        if out_features(children[layout.inputs[0]]) == in_features(children[layout.down]):  # else halves are gated
            return layout
    return None


def _check_extra(mlp: nn.Module, layout: MLPLayout, where: str) -> None:
    """Refuses what experts would leave out.

    Raises:
        ValueError: naming it.
    """
    root = _root(mlp, layout)
    known = {*ACTIVATION_NAMES, *INNER_NORM_NAMES, *(DROPOUT_NAMES if layout.has_dropout else ())}
    known |= {piece for name in layout.linears for piece in name.split(".")}
    # A layer has more children than its MLP's; what takes their place is looked at alone.
    children = [] if layout.block == layout.up and layout.block else list(root.named_children())
    extra = [
        f"{name} ({type(child).__name__})" for name, child in children if name not in known and not _is_inert(child)
    ]
    extra += [
        f"{name}={getattr(root, name)}" for name in INNER_DROPOUT_NAMES if _probability(getattr(root, name, 0)) > 0
    ]
    extra += [
        f"{name}={value}"
        for name, harmless in UNKNOWN_MATHS.items()
        for module in (root, *(child for _, child in children))
        if (value := getattr(module, name, None)) not in harmless
    ]
    if not layout.is_gated and find_inner_norm(mlp) is not None:
        extra += [f"{name} without a gate" for name in INNER_NORM_NAMES if hasattr(mlp, name)]
    if extra:
        raise ValueError(
            f"{where} ({type(mlp).__name__}) computes more than its Linears and its activation: {', '.join(extra)}. "
            "Experts would leave that out; supported beside them are dropout on the result "
            f"({', '.join(DROPOUT_NAMES)}) and a norm before the last Linear ({', '.join(INNER_NORM_NAMES)}). "
            "Leave this layer out of `layers`; a dropout may be set to 0 in the configuration."
        )


def find_layout(mlp: nn.Module, where: str, layout: MLPLayout | None = None) -> MLPLayout:
    """The layout of a dense MLP.

    Args:
        mlp: the module; for a layout that is spread over a layer, the layer.
        where: its path in the tower, for messages.
        layout: the layout where it is known already, to be checked.

    Raises:
        ValueError: if no layout matches, if only some of the Linears have a bias, or if the MLP computes more than its
            Linears and its activation (dropout inside, norms).
    """
    layout = layout or next((row for row in LAYOUTS if _matches(row, mlp)), None)
    if layout is None:
        found = [
            f"{name} ({in_features(child)} to {out_features(child)})"
            for name, child in mlp.named_children()
            if isinstance(child, LINEARS)
        ]
        others = [f"{name} ({type(child).__name__})" for name, child in mlp.named_children()]
        raise ValueError(
            f"{where} ({type(mlp).__name__}) has the Linear children [{', '.join(found or others)}], which match "
            "none of the known MLP layouts: "
            f"{'; '.join(map(str, LAYOUTS))}. Leave this layer out of `layers`, or add its layout to LAYOUTS."
        )
    _check_extra(mlp, layout, where)
    biases = {name for name in layout.linears if mlp.get_submodule(name).bias is not None}
    if biases and biases != layout.linears:
        raise ValueError(
            f"{where} ({type(mlp).__name__}) has a bias in {sorted(biases)} only; expected all Linears or none."
        )
    find_activation(mlp, where, layout)
    return layout


def is_biased(mlp: nn.Module, layout: MLPLayout) -> bool:
    """Whether the MLP's Linears have biases."""
    return mlp.get_submodule(layout.down).bias is not None
