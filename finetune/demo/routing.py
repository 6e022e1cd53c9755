"""Where the tokens went, by layer and modality, and how alike the experts are."""

from typing import Any

import torch
from torch import Tensor, nn

from modeling_vlmoe.towers import sparse_blocks

from ..collator import ChatCollator
from ..expert_similarity import experts_similarity
from ..router_load import IMAGE, TEXT, RouterLoad, summarize

COPIES_ABOVE = 0.999
MODALITIES = {TEXT: "text", IMAGE: "image"}


def similarities(model: nn.Module) -> dict[str, float]:
    """Each sparse block's mean cosine of two experts, by its path."""
    found = {path: experts_similarity(block.experts) for path, block in sparse_blocks(model)}
    return {path: similarity.cosine for path, similarity in found.items() if similarity is not None}


def part_of(path: str) -> str:
    """The part of the model that a block's path lies in."""
    return "connector" if ".connector." in path else "ViT" if ".vision_tower." in path else "LLM"


def shares(count_ME: Tensor) -> dict[str, list[float]]:
    """The experts' shares of a layer's assignments, for each modality that it saw."""
    return {
        name: (count_ME[kind].double() / count_ME[kind].sum()).tolist()
        for kind, name in MODALITIES.items()
        if count_ME[kind].sum() > 0
    }


@torch.no_grad()
def routing_report(model: Any, processor: Any, rows: Any) -> dict[str, Any]:
    """What one pass over some rows shows.

    Returns:
        `layers`: for each sparse layer its experts' shares by modality; `largest_load`: the largest share over all
        layers, and where; `similarity`: each part's mean over its layers of the experts' cosine similarity.
    """
    batch = ChatCollator(processor)([dict(row) for row in rows])
    with RouterLoad(model) as load:
        model.eval()(**batch)
    largest = max(((summarize(count.sum(0)).max_load, name_of(layer)) for layer, count in load.counts.items()))
    alike: dict[str, list[float]] = {}
    for path, similarity in similarities(model).items():
        alike.setdefault(part_of(path), []).append(similarity)
    return {
        "layers": {name_of(layer): shares(count) for layer, count in sorted(load.counts.items(), key=str)},
        "largest_load": {"share": largest[0], "layer": largest[1]},
        "similarity": {part: sum(values) / len(values) for part, values in alike.items()},
    }


def name_of(layer: tuple[str, int | None]) -> str:
    part, index = layer
    return part if index is None else f"{part} layer {index}"
