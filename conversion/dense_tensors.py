"""Matching a parent's checkpoint to the host's own model class: every tensor has a place, or a reason to be dropped.

Old names are renamed as the host's loading renames them, a base model's prefix is added or stripped, a tower is found
inside a whole checkpoint (a ViT in a CLIP, an LLM in a Gemma-3). Anything else is an error: nothing is skipped
quietly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import CONFIG_NAME

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.sparse_moe import Experts

from .meta_models import build_on_meta, fill_mapped, in_float32, target_shapes, tied_names
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
        return build_on_meta(lambda: build(in_float32(config)))
    except BROKEN as error:
        raise ValueError(
            f"{parent.folder / CONFIG_NAME} describes no model that can be built ({type(error).__name__}: {error}). "
            "Correct it."
        ) from error


def dense_model(parent: Parent) -> PreTrainedModel:
    """The parent's own model class, on the meta device."""
    auto: Any = {"text": AutoModelForCausalLM, "vision": AutoModel, "vlm": VLMoEForConditionalGeneration}[parent.role]
    return build_parent(parent, auto._from_config if parent.role == "vlm" else auto.from_config, parent.tower_config)


def map_sparse(tensors: DenseTensors, read: Callable[[str], Tensor] | None = None) -> Any:
    """A sparse checkpoint in its own class, mapped from its files; experts run by the plain loop.

    Args:
        tensors: The checkpoint's.
        read: Gives the tensor of a name, where it is not to be the checkpoint's.
    """
    model = dense_model(tensors.parent)
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation_internal = "eager"
    return fill_mapped(model, read or tensors.tensor)


def saved_model(parent: Parent) -> PreTrainedModel:
    """The model that was saved, on the meta device: it may hold more than the tower (a text tower, a projection)."""
    for name in parent.config.architectures or []:
        if isinstance(model_class := getattr(transformers, name, None), type) and issubclass(
            model_class, PreTrainedModel
        ):
            return build_parent(parent, model_class._from_config, parent.config)
    takes_images = parent.config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto: Any = AutoModelForImageTextToText if takes_images else AutoModel
    return build_parent(parent, auto.from_config, parent.config)


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
            raise computed_while_loading(key)
        return renamed


def computed_while_loading(key: str) -> ValueError:
    """The refusal of a tensor that is not stored as the model has it."""
    return ValueError(
        f"{key} is stored in an old format that transformers converts while it loads. Load the model and save it with "
        "save_pretrained(..., save_original_format=False) first."
    )


def find_dense_tensors(parent: Parent) -> DenseTensors:
    """Gives every tensor of a parent's checkpoint its name in the dense model, or a reason to be dropped.

    Raises:
        ValueError: for a tensor nobody uses, one that is missing, and one of another shape.
    """
    names: TowerNames | None = None
    if parent.is_inside:
        names = TowerNames(parent, saved_model(parent))
        names.settle_tie()
    found = DenseTensors(parent, dense_model(parent))
    shapes, tied = target_shapes(found.model), tied_names(found.model)
    rename: Callable[[str], str | None] = KeyRenamer(found.model) if names is None else names.of(found.model)
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


class TowerNames:
    """Names of a whole checkpoint to names of one of its towers: the host's rules give a key its name in the whole
    model, and what the tower holds there has its own name behind the tower's path.

    Args:
        parent: The parent.
        saved: The whole model, on the meta device.
    """

    def __init__(self, parent: Parent, saved: PreTrainedModel):
        self.parent, self.saved = parent, saved
        self._rename = KeyRenamer(saved)

    def settle_tie(self) -> None:
        """Says on the LLM's configuration whether its head is tied: the whole model's configuration says so, unless
        its files hold a head of their own, as the host decides while it loads.
        """
        config, head = self.parent.tower_config, head_name(self.saved)
        if self.parent.role != "text" or head is None:
            return
        target = tied_names(self.saved).get(head)
        stored = {self._rename.match(key)[0]: key for key in self.parent.reader.names}
        pair = [self.parent.reader.tensor(stored[name]) for name in (head, target) if name in stored]
        config.tie_word_embeddings = target is not None and (len(pair) < 2 or torch.equal(*pair))

    def of(self, model: PreTrainedModel) -> Callable[[str], str | None]:
        """The names of a tower's own model, the causal LM or the ViT; None for a key that is not the tower's.

        Raises:
            ValueError: when the whole model has not exactly one such tower, or the host would compute a tensor.
        """
        is_text = self.parent.role == "text"
        tower = model.base_model if is_text else model
        paths = [path for path, module in self.saved.named_modules() if type(module) is type(tower)]
        if len(paths) != 1:
            raise ValueError(
                f"{self.parent.given} is a {type(self.saved).__name__}, in which {len(paths)} towers are a "
                f"{type(tower).__name__}; expected exactly one. Save the tower alone, and give that."
            )
        inside, own = f"{paths[0]}.", f"{model.base_model_prefix}." if is_text else ""
        head = {head_name(self.saved): head_name(model)} if is_text else {}

        def rename(key: str) -> str | None:
            name, pattern = self._rename.match(key)
            if name is None or not (name.startswith(inside) or name in head):
                return None
            if pattern is not None:
                raise computed_while_loading(key)
            return head[name] if name in head else own + name.removeprefix(inside)

        return rename


def head_name(model: PreTrainedModel) -> str | None:
    """The name of the head's weight; None where there is no head."""
    head = model.get_output_embeddings()
    return next((f"{path}.weight" for path, module in model.named_modules() if module is head), None)


def drop_unmatched(found: DenseTensors, keys: list[str]) -> None:
    """Finds the reason why each of these keys is used nowhere.

    Raises:
        ValueError: naming the keys that have none.
    """
    ignored = found.model._keys_to_ignore_on_load_unexpected or ()
    saved = saved_model(found.parent) if keys else None
    rename_saved = KeyRenamer(saved) if saved is not None else None
    unknown = []
    for key in keys:
        if any(re.search(pattern, key) for pattern in COMPUTED):
            found.dropped[key] = "computed by the model, not learnt"
        elif rename_saved is not None and rename_saved.match(key)[0] is not None:
            found.dropped[key] = f"part of {type(saved).__name__}, not of {type(found.model).__name__}"
        elif any(re.search(pattern, key) for pattern in ignored):
            found.dropped[key] = f"left out by {type(found.model).__name__} too"
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{found.parent.given} holds tensors that {type(found.model).__name__} has no place for: "
            f"{', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}. "
            "Check that weights and config.json belong together."
        )


def check_tied(found: DenseTensors, tied: dict[str, str], rename: Callable[[str], str | None]) -> None:
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
