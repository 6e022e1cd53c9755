"""How much of each part is trained, before a run and in its history."""

from typing import Any

import torch
from torch import Tensor

from .adapted_names import bare_name, cells_by_path, is_added
from .names import CELLS

Counts = dict[str, list[int]]


def num_numbers(parameter: Tensor) -> int:
    """How many it holds, over all processes; ZeRO-3 leaves an empty one, and keeps the number."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def count_cells(model: Any, cells: dict[str, str]) -> Counts:
    """For each cell the numbers that are trained (LoRA's and copies' too), and the model's own.

    Args:
        model: as it is trained, with adapters around it or without.
        cells: those of the bare model's parameters (`parameter_cells`).
    """
    paths = cells_by_path(cells)
    found: Counts = {cell: [0, 0] for cell in CELLS if cell in set(cells.values())}
    for name, parameter in model.named_parameters():
        counted = found[paths[bare_name(name)]]
        counted[0] += num_numbers(parameter) * parameter.requires_grad
        per_code = 2 if parameter.dtype == torch.uint8 else 1  # 4 bits: two numbers to a byte
        counted[1] += num_numbers(parameter) * per_code * (not is_added(name))
    return found


def table(counts: Counts) -> str:
    """What is trained of each part, one below the other, and of all."""
    whole = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = [*counts.items(), ("all", whole)]
    name_width = max(len(name) for name, _ in rows)
    widths = [max(len(f"{count[index]:,}") for _, count in rows) for index in (0, 1)]
    lines = [
        f"  {name:<{name_width}}  {trained:>{widths[0]},} of {own:>{widths[1]},}" for name, (trained, own) in rows
    ]
    return "\n".join(["Trained, by part:", *lines])
