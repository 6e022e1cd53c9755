"""Checkpoints of the host's own sparse models: each tensor under its name in the model, however it is stored.

The host stacks the experts of a layer in one tensor while it loads (`gate_up_proj (E, 2F, D)`); on disk there is
either that stack or a tensor per expert and projection. Which file tensor is which row of the stack is read off the
host's own loading rules, so what is read here is what `from_pretrained` would load.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from .dense_tensors import DenseTensors, KeyRenamer, build_parent, check_complete, check_tied, drop_unmatched
from .meta_models import fill_mapped, target_shapes, tied_names
from .parents import Parent

AUTO_CLASSES: dict[str, Any] = {"text": AutoModelForCausalLM, "vlm": AutoModelForImageTextToText}
EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(eq=False)
class NativeTensors(DenseTensors):
    """A native checkpoint's tensors under the names of its model.

    Attributes:
        stacks: For a stack of experts that is stored apart: per expert the stored names, in the order of its rows.
        transposed: Stacks that are stored whole, each expert transposed (Qwen3-VL-MoE).
    """

    stacks: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        return [*self.stored, *self.stacks]

    def pieces(self, name: str) -> list[str]:
        """The stored tensors that make a tensor, in the order in which its memory follows."""
        if name in self.stored:
            return [self.stored[name]]
        return [key for keys in self.stacks[name] for key in keys]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.stored:
            stored = super().shape(name)
            return (stored[0], stored[2], stored[1]) if name in self.transposed else stored
        read = self.parent.reader.shape
        experts = {(sum(read(key)[0] for key in keys), *read(keys[0])[1:]) for keys in self.stacks[name]}
        if len(experts) > 1:
            raise ValueError(
                f"{self.parent.given}: the experts of {name} have unlike shapes {sorted(experts)}. Mend it."
            )
        return len(self.stacks[name]), *experts.pop()

    def dtype(self, name: str) -> torch.dtype:
        return self.parent.reader.dtype(self.pieces(name)[0])

    def tensor(self, name: str) -> Tensor:
        if name in self.stored:
            return super().tensor(name).mT if name in self.transposed else super().tensor(name)
        return torch.stack([self.expert(name, index) for index in range(len(self.stacks[name]))])

    def expert(self, name: str, index: int) -> Tensor:
        """One expert of a stack, (rows, ...)."""
        if name in self.stored:
            return self.tensor(name)[index]
        keys = self.stacks[name][index]
        return torch.cat([self.parent.reader.tensor(key) for key in keys])


class FileStack:
    """A stack of experts that stays in its files, for a native block's plain loop, which takes one at a time."""

    def __init__(self, tensors: NativeTensors, name: str):
        self._tensors, self._name = tensors, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensors.expert(self._name, int(index))


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a native stack of experts."""
    stacked = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    return hasattr(module, "num_experts") and bool(stacked)


def native_model(parent: Parent) -> PreTrainedModel:
    """A native parent's own class, on the meta device."""
    return build_parent(parent, AUTO_CLASSES[parent.role].from_config, parent.config)


def find_native_tensors(parent: Parent) -> NativeTensors:
    """Gives every tensor of a native checkpoint its name in the model, or a reason to be dropped.

    Raises:
        ValueError: for a tensor nobody uses, one that is missing, and one of another shape.
    """
    found = NativeTensors(parent, native_model(parent))
    shapes, tied = target_shapes(found.model), tied_names(found.model)
    rename = KeyRenamer(found.model)
    unmatched: list[str] = []
    stacked: dict[str, dict[tuple[int, int], str]] = {}
    for key in parent.reader.names:
        name, pattern = rename.match(key)
        if name is None:
            unmatched.append(key)
        elif pattern is not None and only_transposes(pattern, rename.converters):
            found.stored[name] = key
            if parent.reader.shape(key) != shapes[name]:  # the host's rule: where the shape says so
                found.transposed.add(name)
        elif pattern is not None:
            stacked.setdefault(name, {})[expert_place(parent, key, pattern, rename.converters)] = key
        elif name in tied:
            found.dropped[key] = f"tied to {tied[name]}"
        elif name in found.stored:
            raise ValueError(f"{parent.given} holds {name} twice, as {found.stored[name]} and as {key}. Remove one.")
        else:
            found.stored[name] = key
    drop_unmatched(found, unmatched)
    check_tied(found, tied, rename)
    for name, places in stacked.items():
        if name in found.stored:
            raise ValueError(f"{parent.given} holds {name} twice: as one stack, and expert by expert. Remove one.")
        found.stacks[name] = order_places(parent, name, places)
    check_complete(found, shapes)
    return found


def only_transposes(pattern: str, converters: list[WeightConverter]) -> bool:
    """Whether all that the host does with a tensor while it loads is to transpose it where its shape asks for that."""
    converter = next(one for one in converters if pattern in one.source_patterns)
    kinds = [(type(one), getattr(one, "check_dims", None)) for one in converter.operations]
    return kinds == [(Transpose, True)]


def expert_place(parent: Parent, key: str, pattern: str, converters: list[WeightConverter]) -> tuple[int, int]:
    """Which expert a stored tensor belongs to, and which of the expert's projections it is, by the host's rule.

    Raises:
        ValueError: when the host does something else than to stack and to concatenate.
    """
    converter = next(one for one in converters if pattern in one.source_patterns)
    kinds = [(type(one), getattr(one, "dim", None)) for one in converter.operations]
    number = EXPERT_NUMBER.search(key)
    if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]) or number is None:
        raise ValueError(
            f"{parent.given}: {key} is stored in an old format that transformers converts while it loads. Load the "
            "model and save it with save_pretrained(..., save_original_format=False) first."
        )
    return int(number[1]), converter.source_patterns.index(pattern)


def order_places(parent: Parent, name: str, places: dict[tuple[int, int], str]) -> list[tuple[str, ...]]:
    """Per expert its stored tensors, in the order of the stack's rows.

    Raises:
        ValueError: when one is missing.
    """
    num_experts = max(expert for expert, _ in places) + 1
    parts = sorted({part for _, part in places})
    for expert in range(num_experts):
        if missing := [part for part in parts if (expert, part) not in places]:
            raise ValueError(
                f"{parent.given} lacks {len(missing)} of the {len(parts)} tensors of expert {expert} of {name}. "
                "Check that the download is whole."
            )
    return [tuple(places[expert, part] for part in parts) for expert in range(num_experts)]


def fill_native(tensors: NativeTensors, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The native model, mapped from its files, experts run by the plain loop (see `meta_models.fill_mapped`)."""
    model = native_model(tensors.parent)
    for path, module in model.named_modules():
        if is_experts(module):
            module.config._experts_implementation_internal = "eager"
            for name in list(module._parameters):
                del module._parameters[name]
                module.__dict__[name] = FileStack(tensors, f"{path}.{name}")
    return fill_mapped(model, tensors.tensor, dtype)
