"""The dense parents as the proof runs them: each in its own class, mapped from its own files.

A run may be nudged (the input moved by its last bit), and a parent may be rounded to the dtype that is written or
taken as it is stored.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.expert_choice import with_counts
from modeling_vlmoe.image_inputs import find_form, read_features, tower_arguments
from modeling_vlmoe.parts_config import feature_layers
from modeling_vlmoe.sparse_moe import SparseMoE

from .dense_tensors import dense_model
from .gaps import LIMIT, ProofError, measure_gap, nudge
from .mapped_maths import mapped_maths
from .mapping import PART_PREFIX
from .meta_models import build_on_meta, fill_mapped
from .native_tensors import NativeTensors, fill_native
from .parents import BROKEN
from .plans import UpcyclePlan
from .probes import hooked


@dataclass
class DenseRun:
    """A dense model that is ready to run.

    Attributes:
        roots: The dense modules, by what the paths of the sparse MLPs in them begin with.
        dtype: What weights are rounded to; None leaves them as they are stored.
        results: Runs the model, on nudged input where a generator is given, and gives results by what they are.
    """

    roots: dict[str, nn.Module]
    dtype: torch.dtype | None
    results: Callable[[torch.Generator | None], dict[str, Tensor]]

    def __call__(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Runs in float32."""
        with mapped_maths(self.dtype):
            return self.results(generator)


def parent_of(plan: UpcyclePlan, part: str) -> str:
    """The role of the parent that a part comes from."""
    return part if part in plan.dense else "vlm"


def reference_model(plan: UpcyclePlan, role: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """A dense parent in its own class, mapped from its files."""
    tensors = plan.dense[role]
    if isinstance(tensors, NativeTensors):
        return fill_native(tensors, dtype)
    return fill_mapped(dense_model(tensors.parent), tensors.tensor, dtype)


def dense_connector(plan: UpcyclePlan, dtype: torch.dtype | None) -> nn.Module:
    """The dense connector, of the dense vlmoe parent or drawn."""
    model = build_on_meta(lambda: VLMoEForConditionalGeneration(copy.deepcopy(plan.dense_config)))
    prefix = PART_PREFIX["connector"]
    return fill_mapped(model.model.connector, lambda name: plan.dense_tensors[prefix + name].read(), dtype)


def dense_text(plan: UpcyclePlan, tokens: Tensor, dtype: torch.dtype | None) -> DenseRun:
    """The LLM on token ids, (1, sequence): its logits."""
    role = parent_of(plan, "text")
    reference = reference_model(plan, role, dtype)
    root: Any = reference.base_model if role == "text" else reference.model.language_model

    def results(generator: torch.Generator | None) -> dict[str, Tensor]:
        def change(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return output if generator is None else nudge(output, generator)

        with hooked(root.get_input_embeddings().register_forward_hook(change)):
            return {"text logits": reference(input_ids=tokens, use_cache=False).logits}

    return DenseRun({PART_PREFIX["text"]: root}, dtype, results)


def reads_ahead(plan: UpcyclePlan, tokens: Tensor) -> bool:
    """Whether the dense LLM's logits of tokens, (1, sequence), depend on later ones."""
    changed = torch.cat([tokens[:, :-1], tokens[:, :1]], dim=1)
    before, after = (next(iter(dense_text(plan, ids, plan.dtype)().values()))[:, :-1] for ids in (tokens, changed))
    return measure_gap(before, after) > LIMIT


def image_results(
    tower: nn.Module, connector: Any, images: dict[str, Tensor], config: VLMoEConfig, layers: list[int]
) -> dict[str, Tensor]:
    """What ViT and connector make of images, by what it is.

    The model's own `get_image_features` would cast features to the dtype that the connector's weights are mapped in.

    Args:
        tower: The ViT.
        connector: The connector.
        images: What the image processor gave.
        config: Says what the connector reads.
        layers: The hidden states to give.
    """
    form = find_form(type(tower))
    try:
        outputs = tower(images["pixel_values"], **tower_arguments(form, images), output_hidden_states=True)
    except ProofError:  # of a probe inside
        raise
    except BROKEN as error:
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in images.items())
        raise ValueError(
            f"The ViT, a {type(tower).__name__}, cannot read what the image processor makes of pictures ({shapes}): "
            f"{error}. Take the image processor that the ViT came with."
        ) from error
    found = {f"vision hidden state {layer}": outputs.hidden_states[layer] for layer in layers}
    found["vision last hidden state"] = outputs.last_hidden_state
    if outputs.get("pooler_output") is not None:
        found["vision pooled output"] = outputs.pooler_output
    features, counts = read_features(outputs, config, form, images)
    block = connector.mlp
    if isinstance(block, SparseMoE):
        block.context = with_counts(block.context, counts, block.router.moe)
    found["image features"] = block(features)
    if isinstance(block, SparseMoE):
        block.context = None
    return found


def dense_images(plan: UpcyclePlan, images: dict[str, Tensor], dtype: torch.dtype | None) -> DenseRun:
    """ViT and connector on images: what the ViT gives, and the image features."""
    role = parent_of(plan, "vision")
    reference = reference_model(plan, role, dtype)
    tower = reference if role == "vision" else reference.model.vision_tower
    is_llava = role == "vlm" and isinstance(plan.dense[role], NativeTensors)
    connector: Any = nn.ModuleDict({"mlp": reference.model.multi_modal_projector}) if is_llava else None
    connector = connector or dense_connector(plan, dtype)
    layers = feature_layers(plan.config)

    def results(generator: torch.Generator | None) -> dict[str, Tensor]:
        pixels = images["pixel_values"]
        pixels = pixels if generator is None else nudge(pixels, generator)
        found = image_results(tower, connector, images | {"pixel_values": pixels}, plan.config, layers)
        if is_llava:  # by its own code and configuration
            found["image features"] = torch.stack(list(reference.model.get_image_features(pixels).pooler_output))
        return found

    return DenseRun({PART_PREFIX["vision"]: tower, PART_PREFIX["connector"]: connector}, dtype, results)
