"""The router losses by plain loops over tokens, layers and micro-batches: what every trainer is compared with.

Nothing of `modeling_vlmoe.router_losses` is used here. The definition (MATHS 4): per sparse layer and micro-batch,
padding left out; the mean over a part's layers, weighed by the part's coefficients; over the micro-batches of a step
by their share of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling_vlmoe.finetune.router_load import find_body
from modeling_vlmoe.routers import Router


def loop_balance(logits: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """E sum_i F_i P_i over the real tokens of one layer; logits (T, E), chosen experts (T, K), mask (T,)."""
    real = [t for t in range(len(mask)) if mask[t]]
    num_experts, num_picked = logits.shape[1], index.shape[1]
    total = logits.new_zeros(())
    for expert in range(num_experts):
        chosen = sum(int(index[t, k] == expert) for t in real for k in range(num_picked)) / (len(real) * num_picked)
        probability = sum(logits[t].softmax(-1)[expert] for t in real) / len(real)
        total = total + chosen * probability
    return num_experts * total


def loop_z(logits: Tensor, mask: Tensor) -> Tensor:
    """The mean squared logsumexp of the real tokens' logits, (T, E)."""
    real = [t for t in range(len(mask)) if mask[t]]
    return sum(logits[t].exp().sum().log() ** 2 for t in real) / len(real)


@dataclass
class MicroBatch:
    """What a training step has seen.

    Attributes:
        inputs: the keywords of the model's body.
        num_targets: how many tokens the trainer's loss counts; None where it does not count tokens.
    """

    inputs: dict[str, Any]
    num_targets: int | None = None


def part_of(name: str) -> str:
    """The part that a router is in, by its name in the body."""
    if any(piece in name for piece in ("connector", "projector", "merger")):
        return "connector"
    return "vision" if "vision" in name or "visual" in name else "text"


@contextmanager
def routed(body: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collects each router's logits, with their graph, and its choice while the body runs."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, (out[0], out[2])))
        for name, module in body.named_modules()
        if isinstance(module, Router)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def losses_of(body: Any, batch: MicroBatch, coefficients: tuple[float, float]) -> Tensor:
    """The weighted losses of one micro-batch, with the graph down to the routers and below."""
    with routed(body) as found:
        body(**batch.inputs)
    mask = batch.inputs.get("attention_mask")
    by_part: dict[str, list[Tensor]] = {}
    for name, (logits, index) in found.items():
        is_text = part_of(name) == "text" and mask is not None
        mask_T = mask.reshape(-1) if is_text else torch.ones(len(logits))
        loss = coefficients[0] * loop_balance(logits, index, mask_T) + coefficients[1] * loop_z(logits, mask_T)
        by_part.setdefault(part_of(name), []).append(loss)
    return sum(sum(losses) / len(losses) for losses in by_part.values())


def shares(step: list[MicroBatch], world_targets: int | None) -> list[float]:
    """Each micro-batch's share of the step: by its targets where the trainer counts them, else alike."""
    if world_targets is None:
        return [1 / len(step) for _ in step]
    return [batch.num_targets / world_targets for batch in step]


def oracle_gradients(
    model: nn.Module, step: list[MicroBatch], coefficients: tuple[float, float], world_targets: int | None
) -> dict[str, Tensor]:
    """The losses' own gradient of one step on this process, by parameter; parameters without one are left out."""
    body = find_body(model)
    model.zero_grad()
    was_training = model.training
    model.eval()  # nothing is attached here, and there is no dropout
    for batch, share in zip(step, shares(step, world_targets), strict=True):
        loss = losses_of(body, batch, coefficients)
        if loss.requires_grad:
            (share * loss).backward()
    model.train(was_training)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
