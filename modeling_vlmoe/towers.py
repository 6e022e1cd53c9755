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
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .context_keywords import RECORDED, check_runs_once, is_recorded, run_sparse_tower, takes_keywords
from .delta_experts import DeltaExperts, Deltas
from .mlp_layouts import ACTIVATION_NAMES, MLP_NAMES, MLPLayout, find_layout, find_spread_layout
from .part_requests import CONTEXT
from .recorders import forget_recorders, make_recorders_picklable, register_recorders
from .router_losses import RouterLosses
from .routers import Router
from .sparse_moe import Experts, SparseMoE
from .text_gate import TextGate

LAYER_LISTS = (
    "layers",
    "encoder.layers",
    "encoder.layer",
    "decoder.layers",
    "model.layer",
    "vision_encoder.layers",
    "transformer.layers",
    "transformer.encoder.layers",
    "h",
    "blocks",
    "layer",
)
# Parameters of a ViT that are tokens before its patches: (tokens, width) or (width,).
PREFIX_TOKENS = ("class_embedding", "cls_token", "distillation_token", "register_tokens", "cls_register_token")
# A whole MLP in LW-DETR, half of one in BERT.
OTHER_MLP_NAME = "intermediate"


@dataclass(frozen=True)
class DenseMLP:
    """A dense MLP in a tower.

    Attributes:
        path: where its experts go: its name in the tower, "layers.0.mlp".
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
        """The module that the layout's names are children of: the MLP; the layer, where it is spread over that."""
        return self.layer if self.layout.block else getattr(self.layer, self.attribute)

    @property
    def source(self) -> str:
        """The path of `module` in the tower."""
        return self.layout.source_path(self.path)

    def replace(self, block: nn.Module) -> None:
        """Puts a block in its place; where it is spread over the layer, the layer's other pieces pass on what it
        gives.
        """
        setattr(self.layer, self.attribute, block)
        if self.layout.block:
            holder, _, down = self.layout.down.rpartition(".")
            setattr(self.layer.get_submodule(holder), down, nn.Identity())
            for name in ACTIVATION_NAMES:
                if hasattr(self.layer, name):
                    setattr(self.layer, name, nn.Identity())


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


def layer_holders(tower: nn.Module) -> list[Any]:
    """The tower, and models inside it that hold its layers (OPT's decoder): each initialises what is in it."""
    path, _ = tower_layers(tower)
    names = path.split(".")
    outer = [tower.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    return [module for module in outer if isinstance(module, PreTrainedModel)]


def find_dense_mlp(tower: nn.Module, index: int) -> DenseMLP:
    """The dense MLP of one layer.

    Raises:
        ValueError: naming the layer, if it is not there or not exactly one, or if its layout is unknown.
    """
    path, layers = tower_layers(tower)
    where, layer = f"{path}.{index}", layers[index]
    names = [name for name in MLP_NAMES if isinstance(getattr(layer, name, None), nn.Module)]
    spread = None if names else find_spread_layout(layer)
    if spread is not None and spread.block is not None:
        names = [spread.block]
    elif not names and isinstance(getattr(layer, OTHER_MLP_NAME, None), nn.Module):
        names = [OTHER_MLP_NAME]
    if len(names) != 1:
        children = ", ".join(name for name, _ in layer.named_children())
        has_others = any(isinstance(getattr(other, name, None), nn.Module) for other in layers for name in MLP_NAMES)
        advice = "Leave this layer out of `layers`." if has_others else "No layer has one: leave this part dense."
        raise ValueError(
            f"{type(tower).__name__}: {where} has no MLP that matches: expected exactly one of "
            f"{', '.join(MLP_NAMES)}, found "
            f"{names or 'none'} among its children {children}. {advice}"
        )
    mlp = getattr(layer, names[0])
    if isinstance(mlp, SparseMoE) or hasattr(mlp, "experts"):
        raise ValueError(
            f"{type(tower).__name__}: {where}.{names[0]} is sparse already ({type(mlp).__name__}). "
            "Leave this layer out of `layers`, or give a dense tower."
        )
    try:
        layout = find_layout(mlp if spread is None else layer, f"{where}.{names[0]}", spread)
    except ValueError as error:
        said = f"{type(tower).__name__}: {where} has no MLP that matches: {error}"  # which says what to do
        raise ValueError(said) from error
    return DenseMLP(f"{where}.{names[0]}", layer, names[0], layout)


def check_depth(tower: nn.Module, indices: list[int]) -> None:
    """Refuses layers that a tower does not have, whatever its configuration says.

    Raises:
        ValueError: naming the layers.
    """
    path, layers = tower_layers(tower)
    if missing := [index for index in indices if index >= len(layers)]:
        raise ValueError(
            f"{type(tower).__name__} has {len(layers)} layers ({path}), so {missing} cannot carry experts, though its "
            "configuration counts more. Name `layers` that are there."
        )


def sparse_blocks(module: nn.Module) -> list[tuple[str, SparseMoE]]:
    """The sparse blocks below a module, with their paths."""
    return [(path, child) for path, child in module.named_modules() if isinstance(child, SparseMoE)]


def num_prefix_tokens(tower: nn.Module) -> int:
    """How many tokens the ViT puts before its patches: class and distillation tokens, registers."""
    pieces = [(name.split("."), parameter) for name, parameter in tower.named_parameters()]
    # AIMv2's pooling head has a token of its own, behind the patches.
    found = [parameter for path, parameter in pieces if path[-1] in PREFIX_TOKENS and "head" not in path]
    return sum(math.prod(parameter.shape[:-1]) for parameter in found)


def skip_pooling(tower: Any) -> None:
    """Keeps an offloaded ViT from running its pooling head, which the connector does not read; its weights stay.

    SigLIP's is an `nn.MultiheadAttention`, into which accelerate's offloading hooks do not reach (1.15: "Tensor on
    device meta is not on the expected device").
    """
    if hasattr(tower, "use_head"):
        tower.use_head = False


def init_sparse_weights(module: nn.Module, std: float) -> None:
    """Initialises a router or a stack of experts; other modules are left alone."""
    if isinstance(module, (Router, TextGate)):
        module.reset_parameters()
    elif isinstance(module, (DeltaExperts, Experts)):
        module.reset_parameters(std)
    elif isinstance(module, Deltas):
        module.reset_parameters()


def can_split(experts: Experts) -> bool:
    """Whether processes may hold some columns of every expert each: what they compute is then summed, so that nothing
    may be added or normalised after the split.
    """
    return experts.is_gated and not experts.is_biased and experts.inner_norm is None


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
    hook on the layer would not run again; transformers 5.23). Where a tower gives its layers no keywords of its own
    caller (BLOOM, Falcon, MPT; the ViTs of Idefics3, InternVL and SAM), the context is left on the layer for the pass.
    """

    def forward(self, *args, **kwargs):
        context = kwargs.pop(CONTEXT, None)
        if context is None and self.left_context is not None:
            context = self.left_context
            check_runs_once(self, context)
        if context is None:
            return dense_class.forward(self, *args, **kwargs)
        block = getattr(self, self.sparse_attribute)
        block.context = context
        try:
            return dense_class.forward(self, *args, **kwargs)
        finally:
            block.context = None

    return _derived(dense_class, {"forward": forward, "left_context": None, "is_run_again": False})


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
            if isinstance(block.experts, DeltaExperts):
                continue  # not to be split: see `refuse_split_deltas`
            mlp = _wildcard(path)
            names = [name for name, _ in block.experts.named_parameters(recurse=False)]
            self._ep_plan |= {f"{mlp}.experts.{name}": "grouped_gemm" for name in names}
            self._ep_plan[f"{mlp}.experts"] = "ep_dispatch_experts"
            # A row-wise split would add the down bias once per process, and needs a tower that is split around it.
            if self._tp_plan and can_split(block.experts):
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

    @wraps(dense_class.forward)
    def forward(self, *args, **kwargs):
        return run_sparse_tower(self, dense_class.forward, *args, **kwargs)

    no_split = list(dense_class._no_split_modules or [])
    members = {
        "forward": forward,
        "request": None,
        "moe": None,
        "_is_recorded": is_recorded(dense_class),
        "_takes_keywords": takes_keywords(dense_class),
        "_init_weights": _init_weights,
        "init_parallel_plans": init_parallel_plans,
        "save_pretrained": save_pretrained,
        # The host answers these two by searching the source file of the class.
        "_can_set_experts_implementation": classmethod(lambda cls: True),
        "_can_set_attn_implementation": classmethod(lambda cls: dense_class._can_set_attn_implementation()),
        "_no_split_modules": no_split + [f"Sparse{name}" for name in no_split],
    }
    return _derived(dense_class, members)


def make_sparse(
    tower: PreTrainedModel,
    moe: Any,
    experts_implementation: str | None = None,
    copy: bool = False,
    text_width: int | None = None,
) -> PreTrainedModel:
    """Turns a dense tower into its sparse class in place and swaps the MLPs of the chosen layers.

    Args:
        tower: a dense backbone.
        moe: the part's resolved `MoEConfig`.
        experts_implementation: the requested kernel; None takes the host's default.
        copy: whether experts become copies of the dense MLP (expert init *copy*); else they are initialised anew.
        text_width: width of the LLM's word embeddings, which some routers read.

    Returns:
        The tower.

    Raises:
        ValueError: naming the layer that has no MLP of a known layout.
    """
    check_depth(tower, moe.layers)
    mlps = [find_dense_mlp(tower, index) for index in moe.layers]
    sparse_class: Any = sparse_tower_class(type(tower))
    for holder in layer_holders(tower):
        holder.__class__ = sparse_tower_class(type(holder))
    tower.moe = moe
    # A dense tower's configuration says "eager" by the time it is built, so the request is handed in.
    tower.config._experts_implementation_internal = tower.get_correct_experts_implementation(experts_implementation)
    for position, mlp in enumerate(mlps):
        block = SparseMoE(tower.config, moe, mlp.module, len(mlps), mlp.layout, position, text_width)
        if copy:
            if moe.num_shared_experts:
                raise ValueError(
                    "num_shared_experts is 1, but experts are to be copies of the dense MLP, which a shared expert "
                    "beside them would add to. Leave num_shared_experts out."
                )
            block.experts.copy_dense(mlp.module, mlp.layout)
            mark_initialized(block.experts)
        mlp.replace(block.train(tower.training))
        mlp.layer.__class__ = sparse_layer_class(type(mlp.layer))
        mlp.layer.sparse_attribute = mlp.attribute
    path, _ = tower_layers(tower)
    # By the layers' name, since a connector may stand behind them in the same tower (Qwen's).
    tower._can_record_outputs = (type(tower)._can_record_outputs or {}) | {
        name: OutputRecorder(RouterLosses, index=index, layer_name=path) for name, index in RECORDED.items()
    }
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
