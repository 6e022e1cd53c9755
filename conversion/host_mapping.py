"""The total mapping from a host's VLM that is sparse in place to its native sibling: experts and routers get the
sibling's names and layout, every other tensor keeps its own.

Names and layouts are those that the host's own rules give a stored checkpoint, read off its conversion mapping.

    model.language_model.layers.0.mlp.router.weight         -> model.language_model.layers.0.mlp.gate.weight
    model.language_model.layers.0.mlp.experts.gate_up_proj  -> the same name, each expert transposed (Qwen3-VL-MoE)
    model.text_model.layers.0.mlp.experts.down_proj         -> ...block_sparse_moe.experts.*.w2.weight (Mixtral)
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
)

from modeling_vlmoe.parts import find_towers

from .assignments import EXPERTS, ROUTER, Assignment, StackRows
from .dense_tensors import KeyRenamer, head_name
from .mapping import Mapping, SparseMLP
from .meta_models import target_shapes
from .native_mapping import SHARED, NativeMapping
from .native_targets import Pair
from .streaming import TensorSpec

APART, STACKED, TRANSPOSED = "apart", "stacked", "transposed"


@dataclass(frozen=True)
class TransposedRows(StackRows):
    """Rows of one expert in a stack, (rows, columns), as (columns, rows)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return super().shape[::-1]

    def read(self) -> Tensor:
        return super().read().mT


class StoredNames:
    """How the host stores a model's tensors, where their names or layouts are not those in the model."""

    def __init__(self, model: PreTrainedModel):
        rules = [
            rule for rule in get_model_conversion_mapping(model, add_legacy=False) if type(rule) is not PrefixChange
        ]
        reversed_rules = [rule.reverse_transform() for rule in reversed(rules)]
        self._renamings = [rule for rule in reversed_rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in reversed_rules if isinstance(rule, WeightConverter)]

    def __call__(self, name: str) -> str:
        """The stored name of a tensor that is stored as it is."""
        return apply_renamings(name, self._renamings)

    def layout(self, name: str) -> str:
        """How a stack of experts is stored: `APART`, `STACKED` or `TRANSPOSED`."""
        _, pattern = apply_converters(name, self._converters)
        if pattern is None:
            return STACKED
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        return TRANSPOSED if all(isinstance(one, Transpose) for one in converter.operations) else APART


@dataclass(frozen=True)
class EqualCopies:
    """Experts of a ViT's layer or of a connector that are copies of one dense MLP.

    Attributes:
        mlp: The dense MLP and their place.
    """

    mlp: SparseMLP

    def holds(self, name: str) -> bool:
        """Whether a tensor is one of theirs, or of their router or shared expert."""
        return name.startswith(tuple(self.mlp.path + mark for mark in (EXPERTS, ROUTER, *SHARED)))


@dataclass
class HostMapping(NativeMapping):
    """Collects the assignments.

    Attributes:
        stored: How the host stores the written model; None for an LM alone, whose names need no change.
        copies: Experts of the ViT and the connector that are written as one dense MLP.
    """

    stored: StoredNames | None = None
    copies: list[EqualCopies] = field(default_factory=list)

    def spec(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> TensorSpec:
        return TensorSpec(name if self.stored is None else self.stored(name), dtype, shape)

    def build(self) -> Mapping:
        """All targets."""
        for name in self.source.names:
            if name.startswith(self.text_prefix):
                self.add_text(name)
            elif name == head_name(self.source.model):
                self.add(self.names.head, "copy", self.whole(name))
            elif self.names.vision is None:
                self.dropped[name] = "not of the LM, which is exported alone"
            elif one := next((one for one in self.copies if one.holds(name)), None):
                self.add_copies(one.mlp, name)
            else:
                self.add(name, "copy", self.whole(name))
        return self.finished()

    def add_experts(self, pair: Pair, block: str, inner: str, name: str) -> None:
        """A stack of experts, in the layout in which the host stores it.

        Raises:
            ValueError: when the stored layout could not be told from the other.
        """
        layout = APART if self.stored is None else self.stored.layout(name)
        if layout == APART:
            super().add_experts(pair, block, inner, name)
            return
        num_experts, rows, columns = self.source.shape(name)
        kind, shape = StackRows, (num_experts, rows, columns)
        said: tuple[str, ...] = ()
        if layout == TRANSPOSED:
            if rows == columns:
                raise ValueError(
                    f"{name} holds experts of {rows} x {columns}. Qwen3-VL-MoE's files hold experts transposed, and "
                    f"transformers tells that by their shape alone, which here says nothing: servers would read "
                    "other experts than transformers. Export the LM alone where there is one (--to text), or train "
                    "with another moe_intermediate_size."
                )
            kind, shape = TransposedRows, (num_experts, columns, rows)
            said = (f"{inner}, each expert transposed",)
        dense = tuple(kind(self.source, name, expert, 0, rows) for expert in range(num_experts))
        spec = self.spec(f"{block}experts.{inner}", self.source.dtype(name), shape)
        self.targets.append(
            Assignment(spec, "stack", dense, said, num_experts, self.config.text_moe.num_experts_per_tok)
        )
        self.used[name] = prod(self.source.shape(name))

    def add_copies(self, mlp: SparseMLP, name: str) -> None:
        """A tensor of experts that are equal copies: the first expert's, as the dense MLP has it."""
        parameter = name.removeprefix(mlp.path + EXPERTS)
        if parameter == name:
            self.dropped[name] = "of experts that are written as one dense MLP (equal copies)"
            return
        source = mlp.path if mlp.source is None else mlp.source
        if parameter in mlp.shared:
            self.add(f"{source}.{mlp.shared[parameter]}", "copy", self.whole(name))
            return
        inner = mlp.dense_names(parameter)
        step = self.source.shape(name)[1] // len(inner)
        for number, dense_name in enumerate(inner):
            rows: Any = self.rows(name, 0, number * step, (number + 1) * step)
            if mlp.layout.is_transposed and len(rows.shape) == 2:
                rows = TransposedRows(rows.source, rows.name, rows.expert, rows.start, rows.stop)
            self.add(f"{source}.{dense_name}", "copy", rows)
        self.used[name] = prod(self.source.shape(name))  # the other experts are the same bytes


def text_prefix(model: Any) -> str:
    """What the names of the LLM's tensors begin with in a VLM."""
    return f"{find_towers(model)['text'][0]}."


def check_total(mapping: Mapping, native: PreTrainedModel) -> None:
    """Every tensor of the written model is there, and none beside, by the host's own rules for reading them.

    Raises:
        ValueError: naming the tensors.
    """
    rename, wanted = KeyRenamer(native), target_shapes(native)
    found = {spec.name: rename.match(spec.name)[0] for spec in mapping.specs}
    strange = [name for name, place in found.items() if place not in wanted]
    if missing := [name for name in wanted if name not in set(found.values())]:
        strange += [f"{name} (missing)" for name in missing]
    if strange:
        raise ValueError(
            f"{type(native).__name__} has other tensors than this checkpoint gives: {', '.join(strange[:5])} "
            f"({len(strange)} in all). Use the checkpoint with vlmoe's own code."
        )
