"""The total mapping from a vlmoe model's tensors to those of the host's own classes: every one is used, or dropped
with a reason.

The names are those that the host's `save_pretrained` writes (experts apart, as converters and servers read them).

    model.language_model.layers.0.mlp.experts.down_proj -> language_model.model.layers.0.mlp.experts.*.down_proj.weight
    model.language_model.layers.0.mlp.router.weight     -> language_model.model.layers.0.mlp.gate.weight
    model.connector.mlp.linear_1.weight                 -> multi_modal_projector.linear_1.weight
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.mlp_layouts import MLPLayout

from .assignments import EXPERTS, ROUTER, Assignment, DenseTensor, Drawing, StackRows
from .dense_tensors import DenseTensors
from .mapping import PART_PREFIX, Mapping
from .native_targets import IDLE_SHARED_WIDTH, Pair, dense_layers
from .streaming import TensorSpec

SHARED = (".shared_expert.", ".shared_expert_gate.")
HEAD = "lm_head.weight"
DRAWING = Drawing("kept", "uniform", 0)


@dataclass(frozen=True)
class Names:
    """What the parts are called in a written model.

    Attributes:
        text: Before the names of the LLM's tensors.
        head: The head's weight.
        vision: Before the ViT's; None where it is left out.
        connector: Before the connector's; None where it is left out.
    """

    text: str
    head: str
    vision: str | None = None
    connector: str | None = None


LLAVA_NAMES = Names(
    "language_model.model.", "language_model.lm_head.weight", "vision_tower.", "multi_modal_projector."
)


@dataclass(frozen=True)
class DenseForm:
    """How a sparse part becomes dense.

    Attributes:
        layouts: The MLPs' layouts, and whether they have biases, by their paths.
        obstacles: Why one dense MLP cannot compute what the experts compute; none where they are equal copies.
        has_mean: Whether the mean of the experts is an MLP of the dense one's width, with nothing left over.
    """

    layouts: dict[str, tuple[MLPLayout, bool]]
    obstacles: tuple[str, ...]
    has_mean: bool

    @property
    def is_equal(self) -> bool:
        """Whether one dense MLP computes what the experts compute."""
        return not self.obstacles


@dataclass
class NativeMapping:
    """Collects the assignments.

    Attributes:
        source: The vlmoe model's tensors.
        config: Its configuration.
        pair: How its LLM is written; None for a dense LLM, which is written as it is.
        names: What the parts are called.
        forms: For the ViT and the connector, where they are sparse.
        dtype: The model's.
        text_prefix: Before the names of the LLM's tensors in the source.
        targets: The assignments.
        used: How many elements of each source are used.
        dropped: Why a source is used nowhere.
    """

    source: DenseTensors
    config: Any
    pair: Pair | None
    names: Names
    forms: dict[str, DenseForm]
    dtype: torch.dtype
    text_prefix: str = PART_PREFIX["text"]
    targets: list[Assignment] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def spec(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
        """What is written of a target."""
        return TensorSpec(name, dtype, shape)

    def add(self, name: str, operation: str, dense: DenseTensor, again: bool = False) -> None:
        """One target.

        Args:
            name: What it is called.
            operation: A key of `OPERATIONS`.
            dense: What it is made of.
            again: Whether another target uses that already.
        """
        moe = self.config.text_moe
        counts = (moe.num_experts, moe.num_experts_per_tok) if operation == "expert" else (1, 1)
        shape = dense.shape[1:] if operation == "mean" else dense.shape
        self.targets.append(Assignment(self.spec(name, dense.dtype, shape), operation, (dense,), (), *counts))
        if not again:
            self.used[dense.name] = self.used.get(dense.name, 0) + prod(dense.shape)

    def add_router(self, name: str, router: DenseTensor) -> None:
        """A router's weight, in the model's dtype where that rounds nothing."""
        dtype = exact_dtype(router.read(), self.dtype)
        self.targets.append(Assignment(self.spec(name, dtype, router.shape), "copy", (router,)))
        self.used[router.name] = prod(router.shape)

    def whole(self, name: str) -> DenseTensor:
        return DenseTensor(self.source, name)

    def rows(self, name: str, expert: int | None, start: int, stop: int) -> StackRows:
        return StackRows(self.source, name, expert, start, stop)

    def build(self) -> Mapping:
        """All targets.

        Raises:
            ValueError: for a tensor that has no place.
        """
        for name in self.source.names:
            part = next((part for part, prefix in PART_PREFIX.items() if name.startswith(prefix)), None)
            if name == HEAD:
                self.add(self.names.head, "copy", self.whole(name))
            elif part == "text":
                self.add_text(name)
            elif part is None:
                raise ValueError(f"{name} of the checkpoint has no place in a native model. Give a vlmoe model.")
            elif (prefix := getattr(self.names, part)) is None:
                self.dropped[name] = f"the {part} part is not exported"
            else:
                self.add_dense_part(part, prefix, name)
        return self.finished()

    def finished(self) -> Mapping:
        """All targets, once every source is added; each is used, or dropped."""
        self.add_idle_shared_experts()
        for name in self.source.names:
            assert name in self.dropped or self.used.get(name) == prod(self.source.shape(name)), name
        return Mapping(self.targets, {"vlmoe": self.dropped | self.source.dropped})

    # The LLM ---------------------------------------------------------------------------------------------------------

    def add_text(self, name: str) -> None:
        """A tensor of the LLM."""
        rest = name.removeprefix(self.text_prefix)
        layer, found, inner = rest.partition(".mlp.")
        pair = self.pair
        if pair is None or not found:
            self.add(self.names.text + rest, "copy", self.whole(name))
            return
        block = f"{self.names.text}{layer}.{pair.sparse.block}."
        if inner == "router.weight":
            self.add_router(block + pair.sparse.router, self.whole(name))
        elif inner.startswith("experts."):
            self.add_experts(pair, block, inner.removeprefix("experts."), name)
        elif int(layer.rpartition(".")[2]) in dense_layers(self.config) and not pair.sparse.has_dense_layers:
            self.add_equal_experts(pair, block, inner, name)
        else:
            self.add(f"{block}{inner}", "copy", self.whole(name))

    def add_experts(self, pair: Pair, block: str, inner: str, name: str) -> None:
        """A stack of experts, `gate_up_proj` or `down_proj`: one target per expert and projection."""
        num_experts, num_rows, *_ = self.source.shape(name)
        gate, up, down = pair.sparse.expert
        parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}[inner]
        step = num_rows // len(parts)
        for expert in range(num_experts):
            for number, part in enumerate(parts):
                rows = self.rows(name, expert, number * step, (number + 1) * step)
                self.add(f"{block}experts.{expert}.{part}", "expert", rows)

    def add_equal_experts(self, pair: Pair, block: str, inner: str, name: str) -> None:
        """A dense layer's tensor, once per expert; with it, once per layer, a router that may choose what it likes."""
        moe = self.config.text_moe
        part = dict(zip(("gate_proj.weight", "up_proj.weight", "down_proj.weight"), pair.sparse.expert, strict=True))
        for expert in range(moe.num_experts):
            self.add(f"{block}experts.{expert}.{part[inner]}", "expert", self.whole(name), again=expert > 0)
        if inner == "down_proj.weight":
            shape = (moe.num_experts, self.config.text_config.hidden_size)
            spec = self.spec(block + pair.sparse.router, torch.float32, shape)
            self.targets.append(Assignment(spec, "router"))

    def add_idle_shared_experts(self) -> None:
        """Shared experts of zeros, where the target has one and the model has none."""
        if self.pair is None or not self.pair.sparse.has_shared_expert or self.config.text_moe.num_shared_experts:
            return
        width = self.config.text_config.hidden_size
        shapes = {
            "shared_expert.gate_proj.weight": (IDLE_SHARED_WIDTH, width),
            "shared_expert.up_proj.weight": (IDLE_SHARED_WIDTH, width),
            "shared_expert.down_proj.weight": (width, IDLE_SHARED_WIDTH),
            "shared_expert_gate.weight": (1, width),
        }
        equal = [] if self.pair.sparse.has_dense_layers else dense_layers(self.config)
        for layer in sorted([*self.config.text_moe.layers, *equal]):
            for inner, shape in shapes.items():
                name = f"{self.names.text}layers.{layer}.{self.pair.sparse.block}.{inner}"
                self.targets.append(Assignment(self.spec(name, self.dtype, shape), "zeros"))

    # ViT and connector -----------------------------------------------------------------------------------------------

    def add_dense_part(self, part: str, prefix: str, name: str) -> None:
        """A tensor of the ViT or the connector, which are dense in the written model."""
        if part == "connector":
            rest = name.removeprefix(f"{PART_PREFIX[part]}mlp.")
        else:
            rest = name.removeprefix(PART_PREFIX[part])
        mark = next((mark for mark in (EXPERTS, ROUTER, *SHARED) if mark in name), None)
        if mark is None:
            self.add(prefix + rest, "copy", self.whole(name))
            return
        form, path = self.forms[part], name.partition(mark)[0]
        why = "equal copies" if form.is_equal else "their mean"
        if mark != EXPERTS:
            self.dropped[name] = f"the {part} part's experts are written as one dense MLP ({why})"
            return
        layout, is_biased = form.layouts[path]
        target = prefix
        if part != "connector":
            target += f"{layout.source_path(path.removeprefix(PART_PREFIX[part]))}."
        sources = layout.expert_sources(is_biased)[name.partition(mark)[2]]
        step = self.source.shape(name)[1] // len(sources)
        for number, inner in enumerate(sources):
            expert, operation = (0, "copy") if form.is_equal else (None, "mean")
            self.add(target + inner, operation, self.rows(name, expert, number * step, (number + 1) * step))
        if form.is_equal:  # the other experts are the same bytes
            self.used[name] = prod(self.source.shape(name))


def exact_dtype(router: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a router's weight is written in: the model's dtype where every value fits, else as it is stored."""
    if router.dtype == dtype or not dtype.is_floating_point:
        return router.dtype
    return dtype if torch.equal(router.to(dtype).to(router.dtype), router) else router.dtype


def all_equal(stack: Tensor) -> bool:
    """Whether the experts of a stack, (E, ...), are copies of one another."""
    return all(torch.equal(stack[0], expert) for expert in stack[1:])
