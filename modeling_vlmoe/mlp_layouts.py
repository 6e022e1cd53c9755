"""How a dense MLP is written in transformers' backbones, and how its tensors become one stack of experts.

A dense MLP is recognised by the names of its Linear children, never by `model_type`. A new spelling is a new row of
`LAYOUTS`. Whatever the source, experts are stored un-transposed as `gate_up_proj (E, 2F, D)` or `up_proj (E, F, D)`,
`down_proj (E, D, F)` and `<name>_bias (E, rows)`: E experts, F expert width, D model width.

    >>> find_layout(llama.layers[0].mlp, "layers.0.mlp").expert_sources(is_biased=False)
    {'gate_up_proj': ('gate_proj.weight', 'up_proj.weight'), 'down_proj': ('down_proj.weight',)}
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

MLP_NAMES = ("mlp", "feed_forward", "ffn")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")


@dataclass(frozen=True)
class MLPLayout:
    """The names of a dense MLP's Linear children.

    Attributes:
        name: what error messages call this spelling.
        down: the Linear from expert width back to model width.
        up: the Linear to expert width; None where it is fused with the gate.
        gate: the gate's Linear; None where there is no gate or where it is fused.
        gate_up: one Linear of 2F rows, gate first; None where they are apart.
    """

    name: str
    down: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None

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
        """For each tensor of one expert: the dense tensors that make it, concatenated along their first dimension."""
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

    def __str__(self) -> str:
        return f"{self.name} ({', '.join((*self.inputs, self.down))})"


LAYOUTS = (
    MLPLayout("gated", gate="gate_proj", up="up_proj", down="down_proj"),
    MLPLayout("gated, fused", gate_up="gate_up_proj", down="down_proj"),
    MLPLayout("plain", up="fc1", down="fc2"),
    MLPLayout("connector", up="linear_1", down="linear_2"),
)


def _is_inert(module: nn.Module) -> bool:
    """Whether a child of the MLP computes nothing, so that experts may leave it out."""
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def find_activation(mlp: nn.Module, where: str) -> Callable:
    """The MLP's activation; a module is kept as it is, since it may have parameters.

    Raises:
        ValueError: if none of the known attribute names is there.
    """
    for name in ACTIVATION_NAMES:
        if callable(activation := getattr(mlp, name, None)):
            return activation
    raise ValueError(
        f"{where} ({type(mlp).__name__}) has no activation under any of the names {', '.join(ACTIVATION_NAMES)}; "
        "experts cannot repeat it. Leave this layer out of `layers`."
    )


def find_layout(mlp: nn.Module, where: str) -> MLPLayout:
    """The layout of a dense MLP.

    Args:
        mlp: the module.
        where: its path in the tower, for messages.

    Raises:
        ValueError: if no layout matches, if only some of the Linears have a bias, or if the MLP computes more than its
            Linears and its activation (dropout, norms).
    """
    linears = frozenset(name for name, child in mlp.named_children() if isinstance(child, nn.Linear))
    layout = next((row for row in LAYOUTS if row.linears == linears), None)
    if layout is None:
        raise ValueError(
            f"{where} ({type(mlp).__name__}) has the Linear children {sorted(linears)}, which match none of the "
            "known MLP layouts: "
            f"{'; '.join(map(str, LAYOUTS))}. Leave this layer out of `layers`, or add its layout to LAYOUTS."
        )
    extra = {
        name: child
        for name, child in mlp.named_children()
        if name not in linears and name not in ACTIVATION_NAMES and not _is_inert(child)
    }
    if extra:
        raise ValueError(
            f"{where} ({type(mlp).__name__}) computes more than its Linears and its activation: "
            f"{', '.join(f'{name} ({type(child).__name__})' for name, child in extra.items())}. Experts would leave "
            "that out; "
            "leave this layer out of `layers`."
        )
    biases = {name for name in linears if getattr(mlp, name).bias is not None}
    if biases and biases != linears:
        raise ValueError(
            f"{where} ({type(mlp).__name__}) has a bias in {sorted(biases)} only; expected all Linears or none."
        )
    find_activation(mlp, where)
    return layout


def is_biased(mlp: nn.Module, layout: MLPLayout) -> bool:
    """Whether the MLP's Linears have biases."""
    return getattr(mlp, layout.down).bias is not None
