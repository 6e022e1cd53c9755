"""Towers: any transformers backbone, with a `SparseMoE` where the dense MLP of chosen layers was.

A backbone is turned sparse in place by a class derived from its own, made once per backbone: `LlamaModel` becomes
`SparseLlamaModel(LlamaModel)`. The derived class tells the host what a bare swap of modules would lose silently: how
experts are initialised, that router logits can be recorded, that kernels can be switched, and how experts are sharded.
The chosen layers get a derived class too, which hands the router its context inside gradient checkpointing.

    >>> tower = make_sparse(AutoModel.from_config(llama_config), moe)
    >>> type(tower).__name__, type(tower.layers[0]).__name__
    ('SparseLlamaModel', 'SparseLlamaDecoderLayer')
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .mlp_layouts import MLP_NAMES, MLPLayout, find_layout
from .recorders import forget_recorders, make_recorders_picklable, register_recorders
from .router_losses import RouterContext, RouterLosses
from .sparse_moe import Experts, Router, SparseMoE

LAYER_LISTS = ("layers", "encoder.layers", "encoder.layer", "model.layer", "transformer.layers", "h", "blocks")
# Parameters of a ViT that are tokens before its patches: (tokens, width) or (width,).
PREFIX_TOKENS = ("class_embedding", "cls_token", "distillation_token", "register_tokens")
# The keyword by which a layer receives the router's context.
CONTEXT = "router_context"
# What a dense LM does to its head's logits, keyed on the configuration attribute that holds the number.
HEAD_MATHS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma-2, Gemma-3
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "lm_head_multiplier": lambda logits, scale: logits * scale,  # Falcon-H1
}


@dataclass(frozen=True)
class DenseMLP:
    """A dense MLP in a tower.

    Attributes:
        path: its name in the tower, "layers.0.mlp".
        layer: the module that holds it.
        attribute: the layer's attribute.
        layout: how it is written.
    """

    path: str
    layer: Any
    attribute: str
    layout: MLPLayout

    @property
    def module(self) -> nn.Module:
        return getattr(self.layer, self.attribute)


def tower_layers(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """The tower's list of layers and its path.

    Raises:
        ValueError: if none of the known names holds a list of layers.
    """
    for path in LAYER_LISTS:
        try:
            layers = tower.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList) and len(layers):
            return path, layers
    raise ValueError(
        f"{type(tower).__name__} has no list of layers under any of the names {', '.join(LAYER_LISTS)}; it cannot "
        "carry experts. Leave this part dense."
    )


def find_dense_mlp(tower: nn.Module, index: int) -> DenseMLP:
    """The dense MLP of one layer.

    Raises:
        ValueError: naming the layer, if it is not there or not exactly one, or if its layout is unknown.
    """
    path, layers = tower_layers(tower)
    where, layer = f"{path}.{index}", layers[index]
    names = [name for name in MLP_NAMES if isinstance(getattr(layer, name, None), nn.Module)]
    if len(names) != 1:
        children = ", ".join(name for name, _ in layer.named_children())
        raise ValueError(
            f"{type(tower).__name__}: {where} has no MLP that matches: expected exactly one of "
            f"{', '.join(MLP_NAMES)}, found "
            f"{names or 'none'} among its children {children}."
        )
    mlp = getattr(layer, names[0])
    if isinstance(mlp, SparseMoE) or hasattr(mlp, "experts"):
        raise ValueError(
            f"{type(tower).__name__}: {where}.{names[0]} is sparse already ({type(mlp).__name__}). "
            "Leave this layer out of `layers`, or give a dense tower."
        )
    try:
        layout = find_layout(mlp, f"{where}.{names[0]}")
    except ValueError as error:
        raise ValueError(
            f"{type(tower).__name__}: {where} has no MLP that matches: {error} Leave this layer out of `layers`."
        ) from error
    return DenseMLP(f"{where}.{names[0]}", layer, names[0], layout)


def sparse_blocks(module: nn.Module) -> list[tuple[str, SparseMoE]]:
    """The sparse blocks below a module, with their paths."""
    return [(path, child) for path, child in module.named_modules() if isinstance(child, SparseMoE)]


def num_prefix_tokens(tower: nn.Module) -> int:
    """How many tokens the ViT puts before its patches: class and distillation tokens, registers."""
    named = ((name.rpartition(".")[2], parameter) for name, parameter in tower.named_parameters())
    return sum(math.prod(parameter.shape[:-1]) for name, parameter in named if name in PREFIX_TOKENS)


def skip_pooling(tower: Any) -> None:
    """Keeps an offloaded ViT from running its pooling head, which the connector does not read; its weights stay.

    SigLIP's is an `nn.MultiheadAttention`, into which accelerate's offloading hooks do not reach (1.15: "Tensor on
    device meta is not on the expected device").
    """
    if hasattr(tower, "use_head"):
        tower.use_head = False


def apply_head_maths(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What the dense LM of this text configuration does to `lm_head(hidden_states)`; most do nothing."""
    for name, maths in HEAD_MATHS.items():
        if value := getattr(config, name, None):
            logits = maths(logits, value)
    return logits


def init_sparse_weights(module: nn.Module, std: float) -> None:
    """Initialises a router or a stack of experts; other modules are left alone."""
    if isinstance(module, Router):
        module.reset_parameters()
    elif isinstance(module, Experts):
        module.reset_parameters(std)


_SPARSE_CLASSES: dict[type, type] = {}


def _derived(dense_class: type, members: dict[str, Any]) -> type:
    """The class `Sparse<dense>`, made once. `type()` makes classes that do not pickle by name, hence
    `__reduce_ex__`.
    """
    if dense_class not in _SPARSE_CLASSES:
        _SPARSE_CLASSES[dense_class] = type(
            f"Sparse{dense_class.__name__}",
            (dense_class,),
            {"__module__": __name__, "__reduce_ex__": _reduce, "_dense_class": dense_class} | members,
        )
    return _SPARSE_CLASSES[dense_class]


def _reduce(self: Any, protocol: int) -> tuple:
    make_recorders_picklable(self)
    return _rebuild, (type(self)._dense_class,), self.__dict__


def _rebuild(dense_class: type) -> Any:
    is_tower = issubclass(dense_class, PreTrainedModel)
    derived = sparse_tower_class(dense_class) if is_tower else sparse_layer_class(dense_class)
    return derived.__new__(derived)  # type: ignore[call-overload]


def _wildcard(path: str) -> str:
    """A module's path as the host's plans write it: "layers.0.mlp" becomes "layers.*.mlp"."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _drop_idle_rules(tower: Any) -> None:
    """Leaves out the dense MLPs' split rules where no dense MLP is left; the host would warn about them."""
    present = {_wildcard(name) for name, _ in tower.named_modules()}
    for rule in [rule for rule in tower._tp_plan if rule.split(".")[-2:-1] and rule.split(".")[-2] in MLP_NAMES]:
        if rule not in present:
            del tower._tp_plan[rule]


def sparse_layer_class(dense_class: Any) -> type:
    """A layer that takes the router's context from its keywords and gives it to its block.

    Keywords are what gradient checkpointing repeats when it runs a layer again (the host checkpoints `forward`, so a
    hook on the layer would not run again; transformers 5.23).
    """

    def forward(self, *args, **kwargs):
        context = kwargs.pop(CONTEXT, None)
        if context is None:
            return dense_class.forward(self, *args, **kwargs)
        block = getattr(self, self.sparse_attribute)
        block.context = context
        try:
            return dense_class.forward(self, *args, **kwargs)
        finally:
            block.context = None

    return _derived(dense_class, {"forward": forward})


def sparse_tower_class(dense_class: Any) -> type:
    """The class of a backbone whose layers may carry `SparseMoE`: what the host must know about it; one per
    backbone.
    """

    @torch.no_grad()
    def _init_weights(self, module):
        dense_class._init_weights(self, module)
        init_sparse_weights(module, getattr(self.config, "initializer_range", 0.02))

    def init_parallel_plans(self):
        dense_class.init_parallel_plans(self)
        for path, block in sparse_blocks(self):
            mlp = _wildcard(path)
            names = [name for name, _ in block.experts.named_parameters(recurse=False)]
            self._ep_plan |= {f"{mlp}.experts.{name}": "grouped_gemm" for name in names}
            self._ep_plan[f"{mlp}.experts"] = "ep_dispatch_experts"
            # A row-wise split would add the down bias once per process, and needs a tower that is split around it.
            if self._tp_plan and block.experts.is_gated and not block.experts.is_biased:
                self._tp_plan |= {
                    f"{mlp}.experts.gate_up_proj": "packed_colwise",
                    f"{mlp}.experts.down_proj": "rowwise",
                }
                self._tp_plan[f"{mlp}.experts"] = "moe_tp_experts"
        _drop_idle_rules(self)

    def save_pretrained(self, *args, **kwargs):
        raise ValueError(
            f"A sparse tower cannot be saved alone: it would be written as a dense {self.config.model_type} and "
            "reload with random "
            "MLPs. Save the whole vision-language model."
        )

    no_split = list(dense_class._no_split_modules or [])
    members = {
        "_init_weights": _init_weights,
        "init_parallel_plans": init_parallel_plans,
        "save_pretrained": save_pretrained,
        "_can_record_outputs": {
            **(dense_class._can_record_outputs or {}),
            "router_logits": OutputRecorder(RouterLosses, index=0),
            "router_losses": OutputRecorder(RouterLosses, index=2),
        },
        # The host answers these two by searching the source file of the class.
        "_can_set_experts_implementation": classmethod(lambda cls: True),
        "_can_set_attn_implementation": classmethod(lambda cls: dense_class._can_set_attn_implementation()),
        "_no_split_modules": no_split + [f"Sparse{name}" for name in no_split],
    }
    return _derived(dense_class, members)


def make_sparse(
    tower: PreTrainedModel, moe: Any, experts_implementation: str | None = None, copy: bool = False
) -> PreTrainedModel:
    """Turns a dense tower into its sparse class in place and swaps the MLPs of the chosen layers.

    Args:
        tower: a dense backbone.
        moe: the part's resolved `MoEConfig`.
        experts_implementation: the requested kernel; None takes the host's default.
        copy: whether experts become copies of the dense MLP (expert init *copy*); else they are initialised anew.

    Returns:
        The tower.

    Raises:
        ValueError: naming the layer that has no MLP of a known layout.
    """
    mlps = [find_dense_mlp(tower, index) for index in moe.layers]
    sparse_class: Any = sparse_tower_class(type(tower))
    tower.__class__ = sparse_class
    # A dense tower's configuration says "eager" by the time it is built, so the request is handed in.
    tower.config._experts_implementation_internal = tower.get_correct_experts_implementation(experts_implementation)
    for mlp in mlps:
        block = SparseMoE(tower.config, moe, mlp.module, len(mlps))
        if copy:
            if moe.num_shared_experts:
                raise ValueError(
                    "num_shared_experts is 1, but experts are to be copies of the dense MLP, which a shared expert "
                    "beside them would add to. Leave num_shared_experts out."
                )
            block.experts.copy_dense(mlp.module, mlp.layout)
            mark_initialized(block.experts)
        setattr(mlp.layer, mlp.attribute, block)
        mlp.layer.__class__ = sparse_layer_class(type(mlp.layer))
        mlp.layer.sparse_attribute = mlp.attribute
    forget_recorders(tower)  # hooks that are in already would miss the new blocks
    register_recorders(tower)
    tower._no_split_modules = list(
        sparse_class._no_split_modules
    )  # the dense class' own has become an instance attribute
    tower.post_init()
    return tower


def mark_initialized(module: nn.Module) -> None:
    """Keeps the host's initialisation away from weights that are already what they should be."""
    for child in module.modules():
        for marked in (child, *child.parameters(recurse=False)):
            setattr(marked, "_is_hf_initialized", True)  # noqa: B010 (the host's mark, unknown to type checkers)


def context_kwargs(context: RouterContext | None) -> dict[str, Any]:
    """The keywords for a tower's forward that bring its sparse layers their context and report their losses."""
    return {} if context is None else {CONTEXT: context, "output_router_losses": True}
