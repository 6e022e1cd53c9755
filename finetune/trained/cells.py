"""Of which part each parameter of a model is: a total mapping, read off the structure, never off `model_type`.

A tower's layers hold experts, routers, shared experts, MLPs and norms; all else of a layer is attention. Outside of
its layers a tower has norms, embeddings and maybe a head. What is in neither tower is the connector's, unless it is a
model of its own beside them.

>>> cells = parameter_cells(model)
>>> cells["model.language_model.layers.0.mlp.router.weight"], cells["model.vision_tower.layers.3.mlp.fc1.bias"]
('routers', 'vision.mlp')
"""

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from modeling_vlmoe.mlp_layouts import MLP_NAMES, find_spread_layout
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.parts import POOLING, find_towers, text_root, trainable_connector_path, vision_root
from modeling_vlmoe.towers import sparse_blocks, tower_layers

from .names import CELLS, CONNECTOR, OTHERS, TEXT, VISION

# The children of a sparse block, and the kinds that they are.
OF_BLOCKS = {"experts": "experts", "router": "routers", "shared_expert": "shared", "shared_expert_gate": "shared"}
# Of a class' name: modules that scale or normalise. Of a path's pieces: what pools behind a ViT's layers, what joins
# patches there.
NORM, POOLS, MERGES = (
    re.compile("norm|layerscale", re.IGNORECASE),
    re.compile(rf"^{POOLING}$|pool"),
    re.compile("merg"),
)


def mlp_names(layer: nn.Module) -> set[str]:
    """The children of a layer that are its MLP, dense or sparse, or pieces of it."""
    names = {name for name in MLP_NAMES if isinstance(getattr(layer, name, None), nn.Module)}
    spread = None if names else find_spread_layout(layer)
    return names if spread is None else {name.partition(".")[0] for name in spread.linears}


def cell(tower: str, kind: str) -> str:
    """The name of a kind in a tower."""
    return kind if tower == TEXT else OTHERS if tower == OTHERS else f"{tower}.{kind}"


def _below(path: str, prefix: str) -> bool:
    """Whether a path is a prefix or below it."""
    return path == prefix or path.startswith(f"{prefix}.") or not prefix


def _is_norm(module: nn.Module) -> bool:
    return NORM.search(type(module).__name__) is not None


def _kinds_by_path(model: Any) -> dict[str, str]:
    """The kinds of what is below a path, where the path says it: sparse blocks' children, layers, their MLPs."""
    found: dict[str, str] = {}
    for where, tower in find_towers(model).values():
        try:
            path, layers = tower_layers(tower)
        except ValueError:
            continue
        prefix = ".".join(filter(None, (where, path)))
        for index, layer in enumerate(layers):
            found[f"{prefix}.{index}"] = "attention"
            found |= {f"{prefix}.{index}.{name}": "mlp" for name in mlp_names(layer)}
    for path, block in sparse_blocks(model):
        found |= {f"{path}.{name}": OF_BLOCKS[name] for name, _ in block.named_children() if name in OF_BLOCKS}
    return found


def _longest(path: str, kinds: dict[str, str]) -> str | None:
    """The kind that the longest path at or above this one has."""
    pieces = path.split(".")
    for depth in range(len(pieces), 0, -1):
        if (kind := kinds.get(".".join(pieces[:depth]))) is not None:
            return kind
    return None


def _kind(path: str, owner: nn.Module, tower: str, kinds: dict[str, str], is_head: bool, holds_towers: bool) -> str:
    """The kind of the parameters that a module has of its own."""
    said = _longest(path, kinds)
    if said in ("experts", "routers", "shared"):
        return said
    if said is None and (is_head or (tower == VISION and any(POOLS.search(piece) for piece in path.split(".")))):
        return "head"
    if _is_norm(owner):
        return "norms"
    if said is not None:
        return said
    if (tower == CONNECTOR and not holds_towers) or any(MERGES.search(piece) for piece in path.split(".")):
        return "mlp"
    return "embeddings"


def _beside(model: Any, inside: set[nn.Module], connector: str) -> set[nn.Module]:
    """The modules of models that are beside the towers: neither in them nor around them, nor the connector's."""
    towers = [tower for _, tower in find_towers(model).values()]
    found: set[nn.Module] = set()
    for path, one in model.named_modules():
        if not isinstance(one, PreTrainedModel) or one in inside or _below(connector, path):
            continue
        modules = set(one.modules())
        if not any(tower in modules for tower in towers):
            found |= modules
    return found


def _connector(model: Any) -> str:
    """The path of the connector; of a host's that has none that is known, one that nothing is below."""
    if not is_in_place(model.config):
        return f"{model.base_model_prefix}.connector" if model.base_model is not model else "connector"
    try:
        return trainable_connector_path(model)
    except ValueError:
        return "-"


def _towers(model: Any) -> Callable[[str, nn.Module], str]:
    """What says the tower of a module, given its path too."""
    text, vision, connector = text_root(model), vision_root(model), _connector(model)
    body, in_text = set(model.base_model.modules()), set(text.modules())
    in_vision = set() if vision is None else set(vision.modules())
    beside = _beside(model, in_text | in_vision, connector)

    def tower_of(path: str, owner: nn.Module) -> str:
        if _below(path, connector):
            return CONNECTOR
        if owner in in_text or (path and owner not in body):
            return TEXT
        if owner in in_vision:
            return VISION
        return OTHERS if owner in beside else CONNECTOR

    return tower_of


def parameter_cells(model: Any) -> dict[str, str]:
    """The cell of each parameter, by its name; tied ones once, as `named_parameters` gives them.

    Args:
        model: a vlmoe model, without adapters around it.
    """
    tower_of, kinds, body = _towers(model), _kinds_by_path(model), set(model.base_model.modules())
    found: dict[str, str] = {}
    for path, owner in model.named_modules():
        is_head, is_around = bool(path) and owner not in body, owner in (model, model.base_model)
        tower = tower_of(path, owner)
        of_owner = cell(tower, _kind(path, owner, tower, kinds, is_head, is_around))
        found |= {f"{path}.{name}".lstrip("."): of_owner for name, _ in owner.named_parameters(recurse=False)}
    named = [name for name, _ in model.named_parameters()]
    missing = [name for name in named if found.get(name) not in CELLS]
    assert not missing, f"of no part: {missing}"
    return {name: found[name] for name in named}
