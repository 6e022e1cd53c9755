"""What of the dense model is trained where experts are trained in the sparse one: the MLPs that they were made of.

Routers and shared experts have no counterpart. A stage's `control:` says it otherwise.
"""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from modeling_vlmoe.conversion.meta_models import build_vlm
from modeling_vlmoe.parts import connector_blocks, find_towers
from modeling_vlmoe.towers import sparse_blocks, tower_layers

from ..settings import LORA_TARGETS
from ..trained.cells import cell as name_cell
from ..trained.cells import parameter_cells
from ..trained.names import ALL, CONNECTOR, NAMES, SPARSE_KINDS, TEXT, VISION, cells_of, is_pattern, tower_of
from .rates import DENSE_KIND, EXPERTS, dense_groups, kind_of

ALIGN, FULL, DELTA, LORA = "align", "full", "delta", "lora"


def as_list(given: Any) -> list[str]:
    """Words of a setting: a list, or with commas between them."""
    return [word.strip() for word in given.split(",")] if isinstance(given, str) else list(given or [])


def trained_words(settings: Mapping[str, Any]) -> list[str]:
    """What a stage trains, as names and patterns on the sparse model."""
    method, words = settings.get("method", LORA), as_list(settings.get("train"))
    if method == ALIGN:
        return [CONNECTOR]
    if method == DELTA:
        return ["experts", "vision.experts", CONNECTOR]
    if method == FULL:
        return words or [ALL]
    targets = as_list(settings.get("lora_targets") or LORA_TARGETS)
    towers = as_list(settings.get("lora_parts") or [TEXT])
    adapted = [name_cell(tower, kind) for tower in towers for kind in targets if kind in (EXPERTS, DENSE_KIND)]
    return [*adapted, *([CONNECTOR] if settings.get("train_connector") else []), *words]


def sparse_layers(sparse: Any) -> list[str]:
    """The paths of the layers that have experts, the connector's aside."""
    found = []
    for where, tower in find_towers(sparse).values():
        path, layers = tower_layers(tower)
        prefix = ".".join(filter(None, (where, path)))
        found += [f"{prefix}.{index}" for index, layer in enumerate(layers) if sparse_blocks(layer)]
    return found


def mlp_patterns(sparse: Any, dense: Any) -> dict[str, list[str]]:
    """By tower, patterns on the dense model's parameters: the MLPs of the layers that are sparse in the other."""
    layers, has_sparse_connector = sparse_layers(sparse), bool(connector_blocks(sparse))
    found: dict[str, list[str]] = {TEXT: [], VISION: [], CONNECTOR: []}
    for name, cell in parameter_cells(dense).items():
        if kind_of(cell) != DENSE_KIND:
            continue
        tower = tower_of(cell)
        if tower == CONNECTOR and has_sparse_connector:
            found[CONNECTOR] = [f"{CONNECTOR}.{DENSE_KIND}"]
        for layer in layers:
            if name.startswith(f"{layer}."):
                found[tower].append(f"{layer}.{name.removeprefix(f'{layer}.').partition('.')[0]}.*")
    return {tower: list(dict.fromkeys(patterns)) for tower, patterns in found.items()}


class Counterparts:
    """What stands for what between a sparse model and the dense one that it was made of.

    Args:
        sparse: configuration of the sparse model.
        dense: configuration of the dense one.
    """

    def __init__(self, sparse: Any, dense: Any):
        sparse_model, dense_model = build_vlm(sparse), build_vlm(dense)
        self.patterns = mlp_patterns(sparse_model, dense_model)
        self.sparse_cells, self.dense_cells = parameter_cells(sparse_model), parameter_cells(dense_model)

    def of_word(self, word: str) -> list[str]:
        """What a word of `train` is for the dense model."""
        if is_pattern(word):
            if any(fnmatchcase(name, word) for name in self.dense_cells):
                return [word]
            matched = {cell for name, cell in self.sparse_cells.items() if fnmatchcase(name, word)}
            return self.of_cells([cell for cell in matched if kind_of(cell) == "experts"])
        cells = cells_of(word) if word in NAMES else (word,)
        if all(kind_of(cell) in SPARSE_KINDS for cell in cells):
            return self.of_cells([cell for cell in cells if kind_of(cell) == "experts"])
        return [word]

    def of_cells(self, cells: list[str]) -> list[str]:
        """The MLPs that experts were made of."""
        return [pattern for cell in sorted(cells) for pattern in self.patterns.get(tower_of(cell), [])]

    def trained(self, words: list[str]) -> set[str]:
        """The sparse model's cells that names and patterns find something of."""
        named = {cell for word in words if word in NAMES for cell in cells_of(word)}
        patterns = [word for word in words if is_pattern(word)]
        matched = {
            cell for name, cell in self.sparse_cells.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        return (named & set(self.sparse_cells.values())) | matched


def dense_settings(
    settings: Mapping[str, Any], counterparts: Counterparts, where: str, control: Collection[str] = ()
) -> dict[str, Any]:
    """A stage's settings for the dense model.

    Args:
        settings: those of the sparse one's stage.
        counterparts: of the two.
        where: the stage, for what is said.
        control: the settings that the stage's `control:` says itself.

    Returns:
        What differs.

    Raises:
        ValueError: where the stage trains nothing that the dense model has, or what would need two rates there.
    """
    found: dict[str, Any] = {}
    method = settings.get("method", LORA)
    words = as_list(settings.get("train"))
    if method == DELTA:
        found |= {"method": FULL}
        words = trained_words(settings)
    if words:
        found["train"] = list(dict.fromkeys(one for word in words for one in counterparts.of_word(word)))
        if not found["train"] and method != LORA and "train" not in control:
            raise ValueError(
                f"{where} trains {', '.join(words)}, of which the dense model has nothing; say what its control "
                "trains: `control: {train: [...]}` in the stage."
            )
    if method == LORA and (targets := settings.get("lora_targets")) is not None:
        targets = as_list(targets)
        found["lora_targets"] = list(dict.fromkeys(DENSE_KIND if word == EXPERTS else word for word in targets))
    found |= dense_groups(settings, control, counterparts.trained(trained_words(settings)), where)
    return {name: value for name, value in found.items() if value != settings.get(name)}
