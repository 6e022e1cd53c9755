"""How alike the experts of a layer are: the mean cosine of their weights, and how far apart these are.

Read off the weights as they are computed with: delta experts are their base and their pairs, and a LoRA adapter on
experts counts. Weights are read a block of rows at a time, so a large layer costs little memory.

Shapes: E experts, N numbers of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vlmoe.hollow_tensors import is_hollow
from modeling_vlmoe.parts import connector_blocks, find_towers, has_layers
from modeling_vlmoe.routed_lora import read_pairs, unwrapped
from modeling_vlmoe.shared_base import LowRank
from modeling_vlmoe.sparse_moe import SparseMoE
from modeling_vlmoe.towers import sparse_blocks, tower_layers

from .routing_alarms import Layer

ROWS = 256  # of a weight that are read at once


@dataclass(frozen=True)
class Similarity:
    """How alike a layer's experts are.

    Attributes:
        cosine: the mean cosine similarity of two experts' weights, all of them as one vector, over all pairs.
        distance: the mean Euclidean distance of two experts, divided by the experts' mean norm; 0 for copies, and
            exact where a cosine is 1 within rounding.
    """

    cosine: float
    distance: float


def find_blocks(body: Any) -> dict[Layer, SparseMoE]:
    """The sparse block of each sparse layer; of a connector that PEFT trains, the copy that runs."""
    found: dict[Layer, SparseMoE] = {}
    if blocks := connector_blocks(body):
        found["connector", None] = blocks[-1]
    for part, (_, tower) in find_towers(body).items():
        if has_layers(tower):
            for index, layer in enumerate(tower_layers(tower)[1]):
                if own := sparse_blocks(layer):
                    found[part, index] = own[-1][1]
    return found


def _rows(stack: Tensor, most: int | None) -> Iterator[slice]:
    """The rows of a weight, a block at a time; of a sample, evenly spaced ones."""
    num_rows = stack.shape[-2]
    if most is not None and num_rows > most:
        step = num_rows // most
        yield slice(0, step * most, step)
        return
    for first in range(0, num_rows, ROWS):
        yield slice(first, first + ROWS)


def _with_pair(rows_ERD: Tensor, pair: LowRank | None, rows: slice) -> Tensor:
    """Rows of every expert's weight with what its pair adds to them, in double precision."""
    if pair is None:
        return rows_ERD.double()
    return rows_ERD.double() + pair.scale * (pair.b[:, rows].double() @ pair.a.double())


def expert_chunks(experts: nn.Module, most_rows: int | None = None) -> Iterator[Tensor] | None:
    """The experts' weights piece by piece, (E, some of N) each, double precision.

    Args:
        experts: a block's, maybe inside PEFT's wrappers.
        most_rows: read so many rows of each weight only, evenly spaced.

    Returns:
        None where their numbers cannot be read: they are sharded over processes, packed, or under an adapter that PEFT
        runs itself.
    """
    found: Any = unwrapped(experts)
    inner, wrappers = found
    deltas: dict[str, Tensor] = {}
    pairs: dict[str, LowRank] | None = {}
    if hasattr(inner, "deltas"):
        deltas = inner.deltas(None)
        pairs = {name: LowRank(deltas[f"{name}_a"], deltas[f"{name}_b"]) for name in inner.weight_shapes}
    elif wrappers:
        pairs = read_pairs(inner, wrappers)
    named = [*inner.named_parameters(recurse=False), *deltas.items()]
    is_readable = all(type(one.data) is Tensor and not is_hollow(one) and one.numel() for _, one in named)
    if pairs is None or not is_readable or not set(inner.weight_shapes) <= {name for name, _ in named}:
        return None
    weights = {name: getattr(inner, name) for name in inner.weight_shapes}
    biases = [one for name, one in named if name.endswith("_bias")]
    return _chunks(weights, pairs, biases, inner.num_experts, most_rows)


def _chunks(
    weights: dict[str, Any], pairs: dict[str, LowRank], biases: list[Tensor], num_experts: int, most_rows: int | None
) -> Iterator[Tensor]:
    for name, weight in weights.items():
        stack = weight.detach()
        for rows in _rows(stack, most_rows):
            part = stack[rows].expand(num_experts, -1, -1) if stack.ndim == 2 else stack[:, rows]
            yield _with_pair(part, pairs.get(name), rows).flatten(1)
    for bias in biases:
        yield bias.detach().double()


@torch.no_grad()
def experts_similarity(experts: nn.Module, most_rows: int | None = None) -> Similarity | None:
    """How alike the experts of a block are; arguments and None as of `expert_chunks`, None also for one expert."""
    chunks = expert_chunks(experts, most_rows)
    if chunks is None:
        return None
    gram_EE: Any = 0.0
    apart_EE: Any = 0.0
    for chunk_EN in chunks:
        # Differences from the first expert: of copies they are zero, where products would leave their rounding.
        rest_EN = chunk_EN - chunk_EN[:1]
        gram_EE, apart_EE = gram_EE + chunk_EN @ chunk_EN.T, apart_EE + rest_EN @ rest_EN.T
    num_experts = len(gram_EE)
    if num_experts < 2:
        return None
    norm_E = gram_EE.diagonal().sqrt().clamp(min=1e-300)
    first, second = torch.triu_indices(num_experts, num_experts, offset=1)
    cosines = (gram_EE / norm_E / norm_E[:, None])[first, second]
    square_E = apart_EE.diagonal()
    squares = (square_E[first] + square_E[second] - 2 * apart_EE[first, second]).clamp(min=0)
    return Similarity(cosines.mean().item(), (squares.sqrt().mean() / norm_E.mean()).item())
