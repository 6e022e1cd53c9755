"""Matching a parent's checkpoint to the host's own model class: every tensor has a place, or a reason to be dropped.

Old names are renamed as the host's loading renames them, a base model's prefix is added or stripped, a ViT is found
inside a whole CLIP or SigLIP. Anything else is an error: nothing is skipped quietly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import CONFIG_NAME

from modeling_vlmoe import VLMoEForConditionalGeneration

from .meta_models import build_on_meta, target_shapes, tied_names
from .parents import BROKEN, Parent

# What the host leaves out too, in any family: buffers that it computes (transformers 5.23,
# `_adjust_missing_and_unexpected_keys`).
COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(eq=False)
class DenseTensors:
    """A parent's tensors under the names of its dense model.

    Attributes:
        parent: The parent.
        model: Its own class on the meta device: the causal LM, the ViT, or the dense vlmoe model.
        stored: The name in the checkpoint for each name in the model.
        dropped: Why a name in the checkpoint is used nowhere.
    """

    parent: Parent
    model: PreTrainedModel
    stored: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.parent.reader.shape(self.stored[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.parent.reader.dtype(self.stored[name])

    def tensor(self, name: str) -> Tensor:
        return self.parent.reader.tensor(self.stored[name])


def build_parent(parent: Parent, build: Callable[..., PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a parent's configuration, on the meta device.

    Raises:
        ValueError: when there can be no such model.
    """
    try:
        return build_on_meta(lambda: build(config, dtype=torch.float32))
    except BROKEN as error:
        raise ValueError(
            f"{parent.folder / CONFIG_NAME} describes no model that can be built ({type(error).__name__}: {error}). "
            "Correct it."
        ) from error


def dense_model(parent: Parent) -> PreTrainedModel:
    """The parent's own model class, on the meta device."""
    auto: Any = {"text": AutoModelForCausalLM, "vision": AutoModel, "vlm": VLMoEForConditionalGeneration}[parent.role]
    return build_parent(parent, auto._from_config if parent.role == "vlm" else auto.from_config, parent.tower_config)


def saved_model(parent: Parent) -> PreTrainedModel:
    """The model that was saved, on the meta device: it may hold more than the tower (a text tower, a projection)."""
    for name in parent.config.architectures or []:
        if isinstance(model_class := getattr(transformers, name, None), type) and issubclass(
            model_class, PreTrainedModel
        ):
            return build_parent(parent, model_class._from_config, parent.config)
    return build_parent(parent, AutoModel.from_config, parent.config)


class KeyRenamer:
    """Names of a checkpoint to names of a model, by the host's rules."""

    def __init__(self, model: PreTrainedModel):
        self._state = model.state_dict()
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def match(self, key: str) -> tuple[str | None, str | None]:
        """The model's name for a checkpoint's key, None when the model has no such tensor; and the pattern of the
        converter by which the host would compute the tensor, None when it only renames it.
        """
        renamed, pattern = rename_source_key(key, self._renamings, self.converters, self._prefix, self._state)
        if renamed not in self._state and key in self._state:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self._state)
        return (renamed, pattern) if renamed in self._state else (None, None)

    def __call__(self, key: str) -> str | None:
        """The model's name for a checkpoint's key; None when the model has no such tensor.

        Raises:
            ValueError: when the host would compute the tensor, and not only rename it.
        """
        renamed, pattern = self.match(key)
        if pattern is not None:
            raise ValueError(
                f"{key} is stored in an old format that transformers converts while it loads. Load the model and save "
                "it with save_pretrained(..., save_original_format=False) first."
            )
        return renamed


def find_dense_tensors(parent: Parent) -> DenseTensors:
    """Gives every tensor of a parent's checkpoint its name in the dense model, or a reason to be dropped.

    Raises:
        ValueError: for a tensor nobody uses, one that is missing, and one of another shape.
    """
    found = DenseTensors(parent, dense_model(parent))
    shapes, tied = target_shapes(found.model), tied_names(found.model)
    rename = KeyRenamer(found.model)
    unmatched: list[str] = []
    for key in parent.reader.names:
        name = rename(key)
        if name is None:
            unmatched.append(key)
        elif name in tied:
            found.dropped[key] = f"tied to {tied[name]}"
        elif name in found.stored:
            raise ValueError(f"{parent.given} holds {name} twice, as {found.stored[name]} and as {key}. Remove one.")
        else:
            found.stored[name] = key
    drop_unmatched(found, unmatched)
    check_tied(found, tied, rename)
    check_complete(found, shapes)
    return found


def drop_unmatched(found: DenseTensors, keys: list[str]) -> None:
    """Finds the reason why each of these keys is used nowhere.

    Raises:
        ValueError: naming the keys that have none.
    """
    ignored = [*COMPUTED, *(found.model._keys_to_ignore_on_load_unexpected or ())]
    saved = saved_model(found.parent) if keys else None
    rename_saved = KeyRenamer(saved) if saved is not None else None
    unknown = []
    for key in keys:
        if any(re.search(pattern, key) for pattern in ignored):
            found.dropped[key] = "computed by the model, not learnt"
        elif rename_saved is not None and rename_saved(key) is not None:
            found.dropped[key] = f"part of {type(saved).__name__}, not of {type(found.model).__name__}"
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{found.parent.given} holds tensors that {type(found.model).__name__} has no place for: "
            f"{', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. "
            "Check that weights and config.json belong together."
        )


def check_tied(found: DenseTensors, tied: dict[str, str], rename: KeyRenamer) -> None:
    """A tied tensor that is stored nonetheless equals the one it is tied to, or is the only one stored."""
    for key in [key for key, reason in found.dropped.items() if reason.startswith("tied to ")]:
        target = tied[rename(key) or ""]
        if target not in found.stored:
            found.stored[target] = key
            del found.dropped[key]
        elif not torch.equal(found.parent.reader.tensor(key), found.tensor(target)):
            raise ValueError(
                f"{found.parent.given} ties {key} to {found.stored[target]} (tie_word_embeddings), but stores two "
                "unlike tensors. Set tie_word_embeddings to false in its config.json to keep both."
            )


def check_complete(found: DenseTensors, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor of the model is there, with its shape."""
    kind, present = type(found.model).__name__, set(found.names)
    if missing := [name for name in shapes if name not in present]:
        raise ValueError(
            f"{found.parent.given} lacks tensors of {kind}: {', '.join(missing[:5])} ({len(missing)} in all). "
            "Check that weights and config.json belong together, and that the download is whole."
        )
    for name, shape in shapes.items():
        if found.shape(name) != shape:
            raise ValueError(
                f"{found.parent.given}: {found.stored.get(name, name)} has the shape {found.shape(name)}, but "
                f"config.json makes it {shape}. Check that the two belong together."
            )
        if not found.dtype(name).is_floating_point and found.model.state_dict()[name].is_floating_point():
            raise ValueError(
                f"{found.parent.given}: {found.stored.get(name, name)} is stored as {found.dtype(name)}: quantised? "
                "Give the full-precision parent."
            )
