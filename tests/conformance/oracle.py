"""The router losses by plain loops over tokens, layers and micro-batches: what every trainer is compared with.

Nothing of `modeling_vlmoe.router_losses` and of what a router computes is used here: logits, scores and choices are
made again from its weights, for every kind of router. The definition (MATHS 4): per sparse layer and micro-batch,
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


def open_experts(moe: Any, is_image: bool) -> list[int]:
    """The experts that are open to an image token, or to another one."""
    first, second, _ = moe.modality_experts or (0, 0, moe.num_experts)
    return [e for e in range(moe.num_experts) if (e < first or e >= first + second if is_image else e >= first)]


def loop_logits(router: Router, x: Tensor, added: Tensor | None, is_image: list[bool]) -> Tensor:
    """The logits of tokens, (T, E), from the router's weights; normalised where it normalises them, and minus infinity
    where an expert is closed.

    Args:
        router: the router.
        x: the tokens, (T, D).
        added: what a text gate adds.
        is_image: of the LLM's routers, which tokens are of images.
    """
    logits = x.float() @ router.weight.float().T
    if router.image_weight is not None:
        of_images = x.float() @ router.image_weight.float().T
        logits = torch.where(torch.tensor(is_image)[:, None], of_images, logits)
    if added is not None:
        logits = logits + added
    if (spread := router.moe.router_logit_norm) is not None:
        logits = spread * (logits - logits.mean(1, keepdim=True)) / (logits.var(1, False, True) + 1e-12).sqrt()
    if router.moe.modality_experts is not None:
        is_open = [[e in open_experts(router.moe, one) for e in range(router.moe.num_experts)] for one in is_image]
        logits = logits.masked_fill(~torch.tensor(is_open), -torch.inf)
    return logits


def loop_scores(router_type: str, logits: Tensor) -> Tensor:
    """What a token's experts score, (E,)."""
    exponents = logits.exp()
    return exponents / (1 + exponents) if router_type == "sigmoid" else exponents / exponents.sum()


def loop_choice(router: Router, logits: Tensor) -> Tensor:
    """The experts that tokens choose, (T, K): the best by score and bias."""
    chosen = []
    for row in logits.detach():
        score = loop_scores(router.moe.router_type, row)
        score = score if router.expert_bias is None else score + router.expert_bias
        order = sorted(range(len(row)), key=lambda expert, score=score: -score[expert].item())
        chosen.append(order[: router.moe.num_experts_per_tok])
    return torch.tensor(chosen)


def loop_balance(logits: Tensor, index: Tensor, mask: Tensor, router_type: str = "softmax") -> Tensor:
    """E sum_i F_i P_i over the real tokens of one layer; logits (T, E), chosen experts (T, K), mask (T,)."""
    real = [t for t in range(len(mask)) if mask[t]]
    num_experts, num_picked = logits.shape[1], index.shape[1]
    scores = [loop_scores(router_type, logits[t]) for t in real]
    shares = [score / score.sum() for score in scores]
    total = logits.new_zeros(())
    for expert in range(num_experts):
        chosen = sum(int(index[t, k] == expert) for t in real for k in range(num_picked)) / (len(real) * num_picked)
        probability = sum(share[expert] for share in shares) / len(real)
        total = total + chosen * probability
    return num_experts * total


def loop_balance_by_modality(logits: Tensor, index: Tensor, mask: Tensor, is_image: list[bool], moe: Any) -> Tensor:
    """The balance of image tokens and that of text tokens, each of the experts that are open to them, weighed by
    their shares of the real tokens.
    """
    real, total = [t for t in range(len(mask)) if mask[t]], logits.new_zeros(())
    for modality in (True, False):
        own = [t for t in real if is_image[t] == modality]
        if own:
            kept = open_experts(moe, modality)
            renumbered = torch.tensor([[kept.index(e) for e in index[t].tolist()] for t in own])
            total = total + len(own) / len(real) * loop_balance(logits[own][:, kept], renumbered, torch.ones(len(own)))
    return total


def loop_z(logits: Tensor, mask: Tensor) -> Tensor:
    """The mean squared logsumexp of the real tokens' logits, (T, E); of a closed expert, whose exp is zero, too."""
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


def image_ids(config: Any) -> set[int]:
    """The ids of the tokens that stand for images and videos."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return {getattr(config, name) for name in names if getattr(config, name, None) is not None}


@contextmanager
def routed(body: nn.Module) -> Iterator[dict[str, tuple[Router, Tensor, Tensor | None]]]:
    """Collects each router, what it is given, and what its text gate adds, with their graphs, while the body runs."""
    found: dict[str, tuple[Router, Tensor, Tensor | None]] = {}
    added: dict[nn.Module, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda one, args, _: found.__setitem__(name, (one, args[0], added.get(one.text_gate)))

    routers = {name: module for name, module in body.named_modules() if isinstance(module, Router)}
    handles = [router.register_forward_hook(keep(name)) for name, router in routers.items()]
    handles += [
        router.text_gate.register_forward_hook(lambda gate, _, out: added.__setitem__(gate, out))
        for router in routers.values()
        if router.text_gate is not None
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
    mask, images = batch.inputs.get("attention_mask"), image_ids(body.config)
    by_part: dict[str, list[Tensor]] = {}
    for name, (router, x, added) in found.items():
        is_text = part_of(name) == "text" and mask is not None
        mask_T = mask.reshape(-1) if is_text else torch.ones(len(x))
        moe = router.moe
        is_image = [token in images for token in batch.inputs["input_ids"].flatten().tolist()]
        logits = loop_logits(router, x, added, is_image)
        loss = coefficients[1] * loop_z(logits, mask_T)
        index = loop_choice(router, logits)
        if moe.modality_routing != "shared":
            loss = loss + coefficients[0] * loop_balance_by_modality(logits, index, mask_T, is_image, moe)
        elif moe.router_type != "expert_choice":  # whose load is even by construction
            loss = loss + coefficients[0] * loop_balance(logits, index, mask_T, moe.router_type)
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
