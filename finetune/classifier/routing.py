"""Whether the text routes the image: how each task's image tokens are shared out over the experts of each layer.

How far the tasks differ is their Jensen-Shannon divergence in bits (Lin, 1991, with the tasks weighted alike): what an
assignment to an expert tells of the task. 0: routed alike, as it has to be where routers read the image alone. A token
goes to k of N experts, so it is log2(N / k) at most, and no more than log2 of the number of tasks.
"""

import math
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.visible_text import IMAGE_PARTS

from ..demo.routing import name_of
from ..router_load import IMAGE, RouterLoad
from .batches import ClassificationCollator, RowReader
from .data import Data


def divergence_bits(share_TE: Tensor) -> float:
    """The Jensen-Shannon divergence of distributions over experts, in bits.

    Args:
        share_TE: (tasks, experts), each row sums to one.
    """
    entropy_of_mean = torch.special.entr(share_TE.mean(0)).sum()
    mean_of_entropies = torch.special.entr(share_TE).sum(-1).mean()
    return ((entropy_of_mean - mean_of_entropies).clamp(min=0) / torch.log(torch.tensor(2.0))).item()


@torch.no_grad()
def routing_by_task(model: Any, processor: Any, data: Data, batch_size: int = 256) -> dict[str, Any]:
    """Where the test images' tokens go, task by task.

    Args:
        model: a sparse classifier.
        processor: its processor.
        data: whose test rows are run.
        batch_size: rows per pass.

    Returns:
        `layers`: for each sparse layer its experts' shares by task, `load`, and how far these differ,
        `divergence_bits`; `most_bits`, what that may be at most.
    """
    model.eval()
    collate = ClassificationCollator(RowReader(processor), data.labels)
    tasks = [task for task in data.tasks if any(row.task == task for row in data.test)]
    shares: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        rows = [row for row in data.test if row.task == task]
        with RouterLoad(model) as load:
            for start in range(0, len(rows), batch_size):
                batch = collate(rows[start : start + batch_size])
                model(**{name: value.to(model.device) for name, value in batch.items()})
        for layer, count_ME in sorted(load.counts.items(), key=str):
            if layer[0] != "text":
                count_E = count_ME[IMAGE].double()
                shares.setdefault(name_of(layer), {})[task] = (count_E / count_E.sum()).tolist()
    layers = {
        name: {"load": by_task, "divergence_bits": divergence_bits(torch.tensor(list(by_task.values())))}
        for name, by_task in shares.items()
    }
    return {"layers": layers, "most_bits": min(math.log2(len(tasks)), most_of_routing(model.config))}


def most_of_routing(config: Any) -> float:
    """The most that a layer's loads may differ by, in bits: each task of its own k of the N experts."""
    moes = [config.moe(part) for part in IMAGE_PARTS]
    return max(math.log2(moe.num_experts / moe.num_experts_per_tok) for moe in moes if moe is not None)
