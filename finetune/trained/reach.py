"""Which parameters of a ViT no gradient reaches: what lies behind the hidden state that the connector reads.

Our composite is asked itself: a model of its configuration encodes a blank image on tensors without numbers, and goes
back. A host's VLM, whose inputs its own processor makes, is told from its structure: layers behind the last one that
is read, pooling heads, and the norm behind the layers where hidden states are read and not the ViT's output.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from modeling_vlmoe.configuration_vlmoe import VLMoEConfig
from modeling_vlmoe.conversion.meta_models import build_vlm
from modeling_vlmoe.image_inputs import blank_image
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.part_images import PartImages, no_text
from modeling_vlmoe.parts import find_towers
from modeling_vlmoe.parts_config import FEATURE_LAYERS, num_feature_layers
from modeling_vlmoe.router_losses import RouterContext
from modeling_vlmoe.towers import tower_layers
from modeling_vlmoe.visible_text import parts_reading_text

from ..hollow_operations import HollowOperations, make_hollow

# What can go wrong where a ViT's forward asks for numbers: then its structure is asked.
NOT_HOLLOW = (RuntimeError, ValueError, TypeError, NotImplementedError)


def _behind_layers(model: Any, cells: dict[str, str]) -> frozenset[str]:
    """What lies behind the hidden state that is read, by the structure of the ViT."""
    towers = find_towers(model)
    if "vision" not in towers:
        return frozenset()
    where, tower = towers["vision"]
    path, layers = tower_layers(tower)
    prefix, num_read = f"{where}.{path}", num_feature_layers(model.config)
    idle = tuple(f"{prefix}.{index}." for index in range(num_read, len(layers)))
    found = {name for name in cells if name.startswith(idle)} if idle else set()
    found |= {name for name, cell in cells.items() if cell == "vision.head"}
    if any(getattr(model.config, name, None) is not None for name in FEATURE_LAYERS):
        ends = [name for name, child in tower.named_children() if name.startswith("post")]
        found |= {name for name in cells if name.startswith(tuple(f"{where}.{end}." for end in ends) or ("-",))}
    return frozenset(found)


@lru_cache(maxsize=8)
def _asked(values: str) -> frozenset[str] | None:
    """The parameters of the ViT that get no gradient, by their names in the whole model; None where it cannot be run
    without numbers.

    Args:
        values: the configuration, as JSON.
    """
    config = VLMoEConfig.from_dict(json.loads(values))
    try:
        model: Any = build_vlm(config)
        make_hollow(model, FakeTensorMode(allow_non_fake_inputs=True))
        body, context = model.base_model, RouterContext(learns=False)
        for part in parts_reading_text(config):
            context.images[part] = PartImages(1, None, no_text(1, config.text_config.hidden_size, torch.device("cpu")))
        with HollowOperations():
            image = blank_image(body.image_form, config.vision_config)
            found = body.get_image_features(**image, router_context=context, return_dict=True)
            torch.cat(list(found.pooler_output)).sum().backward()
    except NOT_HOLLOW:
        return None
    prefix = f"{model.base_model_prefix}.vision_tower."
    return frozenset(name for name, one in model.named_parameters() if name.startswith(prefix) and one.grad is None)


def idle_parameters(model: Any, cells: dict[str, str]) -> frozenset[str]:
    """The parameters that no gradient reaches, by name.

    Args:
        model: a vlmoe model.
        cells: of its parameters (`parameter_cells`).
    """
    if not is_in_place(model.config) and (found := _asked(model.config.to_json_string(use_diff=False))) is not None:
        return found
    return _behind_layers(model, cells)
