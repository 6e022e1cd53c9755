"""Where the parts of a vision-language model are: its LLM's tower, its ViT and its connector, in our own composite and
in any VLM of transformers.

They are found by structure, never by `model_type`: towers by the host's own accessors, the connector as the one MLP of
a known layout that maps into the LLM, outside of both towers' layers.

    >>> {part: path for part, (path, _) in find_towers(qwen2_5_vl).items()}
    {'text': 'model.language_model', 'vision': 'model.visual'}
    >>> find_connector(qwen2_5_vl).path
    'model.visual.merger.mlp'
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .mlp_layouts import find_layout, find_spread_layout, out_features
from .moe_config import part_config
from .sparse_moe import SparseMoE
from .towers import DenseMLP, sparse_blocks, tower_layers

# A pooling head behind a ViT's layers, as SigLIP has; no VLM reads what it gives.
POOLING = "head"
# What the configuration of a ViT has that joins patches behind its layers, into the width of the LLM (Qwen2-VL).
MERGES = "spatial_merge_size"


def has_layers(module: nn.Module) -> bool:
    """Whether a module has a list of layers by a name that is known."""
    try:
        tower_layers(module)
    except ValueError:
        return False
    return True


def with_layers(module: nn.Module) -> nn.Module:
    """The model inside a module that holds the layers; itself where none does.

    Of several around the same layers it is the innermost, which is always called: BLIP-2's OPT calls its decoder
    past the base model around it (transformers 5.23).
    """
    inner = [child for child in module.modules() if isinstance(child, PreTrainedModel) and has_layers(child)]
    if not inner:
        return module
    layers = tower_layers(inner[0])[1]
    return [child for child in inner if tower_layers(child)[1] is layers][-1]


def path_of(model: nn.Module, wanted: nn.Module) -> str:
    """A module's path in a model.

    Raises:
        ValueError: if it is not in it.
    """
    for path, module in model.named_modules():
        if module is wanted:
            return path
    raise ValueError(f"{type(model).__name__} holds no such {type(wanted).__name__}.")


def text_root(model: PreTrainedModel) -> nn.Module:
    """The LLM, as the host tells it: the tower, or a causal LM around it; of one with an encoder (Florence-2's BART)
    its decoder.
    """
    root: Any = model.get_decoder()
    return root.get_decoder() if getattr(root.config, "is_encoder_decoder", False) else root


def word_embedding(model: Any) -> Any:
    """The embedding of words: the model's, or its LLM's where the host does not say (PP-FormulaNet in transformers
    5.23, whose `get_input_embeddings` raises NotImplementedError).
    """
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return text_root(model).get_input_embeddings()  # type: ignore[operator]


def vision_root(model: Any) -> nn.Module | None:
    """The ViT: what the host gives as the encoder of images, else the model that has the ViT's configuration; None
    where there is none.
    """
    text, vision = set(text_root(model).modules()), part_config(model.config, "vision")
    encoder = model.get_encoder(modality="image")
    candidates = [encoder, *(one for one in model.modules() if isinstance(one, PreTrainedModel))]
    if vision is None:
        return None
    return next((one for one in candidates if one not in text and getattr(one, "config", None) is vision), None)


def find_towers(model: Any) -> dict[str, tuple[str, Any]]:
    """The towers that hold layers, "text" and "vision", each with its path in the model; what is not there is left
    out.

    Args:
        model: a model of a configuration that knows its parts, with or without a head.
    """
    roots = {"text": text_root(model), "vision": vision_root(model)}
    towers = {part: with_layers(root) for part, root in roots.items() if root is not None}
    return {part: (path_of(model, tower), tower) for part, tower in towers.items() if tower is not model}


def _outside(model: nn.Module, closed: set[nn.Module], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model that no closed one holds, with their paths."""
    for name, child in model.named_children():
        if child not in closed:
            yield path + name, child
            yield from _outside(child, closed, f"{path}{name}.")


def _connector_at(model: nn.Module, path: str, module: nn.Module) -> DenseMLP | None:
    """The MLP that a module is, or that is spread over it; None where it is none."""
    holder, _, name = path.rpartition(".")
    try:
        return DenseMLP(path, model.get_submodule(holder), name, find_layout(module, path))
    except ValueError:
        pass
    if (spread := find_spread_layout(module)) is None or not isinstance(module.get_submodule(spread.down), nn.Linear):
        return None
    try:
        layout = find_layout(module, path, spread)
    except ValueError:
        return None
    return DenseMLP(f"{path}.{layout.block}", module, str(layout.block), layout)


def connectors(model: Any, inside: bool) -> list[DenseMLP]:
    """The dense MLPs that may be the connector.

    Args:
        model: the model.
        inside: whether to look inside the ViT, behind its layers (Qwen's merge patches there).
    """
    width = part_config(model.config, "text").hidden_size
    towers = find_towers(model)
    closed = {text_root(model)}
    others = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    # Models beside the towers (a ViT for videos, an audio encoder, a Q-Former) are closed, those around them not.
    closed |= {one for one in others if all(tower not in set(one.modules()) for _, tower in towers.values())}
    vision = vision_root(model)
    if vision is not None:
        closed |= {tower_layers(towers["vision"][1])[1]} if inside and has_layers(vision) else {vision}
    found: list[DenseMLP] = []
    for path, module in _outside(model, closed):
        if any(piece.isdigit() or piece == POOLING for piece in path.split(".")):
            continue
        if any(path.startswith(f"{one.path}.") or one.layer is module for one in found):
            continue
        mlp = _connector_at(model, path, module)
        if mlp is not None and out_features(mlp.module.get_submodule(mlp.layout.down)) == width:
            found.append(mlp)
    return found


def find_connector(model: Any) -> DenseMLP:
    """The dense connector; its path and layer are the model's.

    Raises:
        ValueError: if there is not exactly one MLP of a known layout between the towers.
    """
    found = connectors(model, inside=False)
    if not found and hasattr(part_config(model.config, "vision"), MERGES):
        found = connectors(model, inside=True)
    if len(found) != 1:
        named = ", ".join(f"{one.path} ({type(one.module).__name__})" for one in found)
        children = model.base_model.named_children()
        between = ", ".join(f"{name} ({type(child).__name__.removeprefix('Sparse')})" for name, child in children)
        name = type(model).__name__.removeprefix("Sparse")
        raise ValueError(
            f"{name} has {len(found) or 'no'} MLPs of a known layout between its ViT and its LLM"
            f"{': ' + named if found else ''}; expected exactly one (it consists of {between}). Leave the connector "
            "dense: give no --connector-experts, no connector_moe."
        )
    return found[0]


def connector_blocks(model: Any) -> list[SparseMoE]:
    """The connector's experts; none where it is dense, several where an adapter holds a copy."""
    towers = [tower for _, tower in find_towers(model).values() if has_layers(tower)]
    layers = {module for tower in towers for module in tower_layers(tower)[1].modules()}
    return [one for one in model.modules() if isinstance(one, SparseMoE) and one not in layers]


def blocks_of(model: Any, parts: Collection[str | None]) -> list[tuple[str, SparseMoE]]:
    """The sparse blocks of these parts, with their paths in the model."""
    found: list[tuple[str, SparseMoE]] = []
    inside = {part: set(tower.modules()) for part, (_, tower) in find_towers(model).items()}
    connector = connector_blocks(model)
    for path, block in sparse_blocks(model):
        towers = (part for part, modules in inside.items() if block in modules)
        if ("connector" if any(block is one for one in connector) else next(towers, None)) in parts:
            found.append((path, block))
    return found


def connector_path(model: Any) -> str:
    """The path of the connector in a model, dense or sparse.

    Raises:
        ValueError: if it is dense, and not the one MLP of a known layout between the towers.
    """
    blocks = connector_blocks(model)
    return path_of(model, blocks[0]) if blocks else path_of(model, find_connector(model).module)


def trainable_connector_path(model: Any) -> str:
    """The path of what is between the towers, to be trained whole: the connector's MLP, or where it is none that is
    known (a single Linear, say) the one module that holds it.

    Raises:
        ValueError: if there is not exactly one.
    """
    if connector_blocks(model) or connectors(model, inside=False) or connectors(model, inside=True):
        return connector_path(model)
    towers = {text_root(model), vision_root(model)}
    beside = [
        module
        for _, module in model.base_model.named_children()
        if not towers & set(module.modules()) and any(True for _ in module.parameters())
    ]
    if len(beside) != 1:
        found = ", ".join(f"{path_of(model, one)} ({type(one).__name__})" for one in beside) or "nothing"
        raise ValueError(
            f"{type(model).__name__.removeprefix('Sparse')} has {found} between its ViT and its LLM; expected one "
            "module that is its connector. Leave the connector as it is: method lora, train_connector=false."
        )
    return path_of(model, beside[0])


def write_text_width(config: Any, tower: nn.Module) -> None:
    """Writes the resolved expert width of the LLM where other tools look for it.

    Args:
        config: the whole model's.
        tower: the LLM's, sparse where the configuration says so.
    """
    if (moe := config.text_moe) is not None:
        _, layers = tower_layers(tower)
        layer: Any = layers[moe.layers[0]]
        moe.moe_intermediate_size = getattr(layer, layer.sparse_attribute).experts.intermediate_size
        if moe.num_shared_experts and moe.shared_expert_intermediate_size is None:
            moe.shared_expert_intermediate_size = moe.moe_intermediate_size
