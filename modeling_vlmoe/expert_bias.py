"""Balance without a loss: a bias per expert, raised while the expert gets few tokens (Wang et al., 2408.15664).

A router adds it to the scores by which it chooses experts, not to the weights. After each optimizer step

    b_i <- b_i + u sign(even load_i - load_i)

with the loads of all training passes since the last step, summed over processes, padding left out. The even load is
the mean; where experts are closed to some tokens (modality_routing.py), what expert i would get if the tokens of each
modality were spread evenly over the experts open to them. There is no gradient.

Routers note their loads themselves, and a hook on every optimizer's step finds those whose weights the optimizer
trains, so that it works under any trainer and in any loop. A step that does not happen (fp16's scaler skips one after
an overflow) changes nothing: loads add up until the next.
"""

import weakref
from collections.abc import Iterable
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .modality_routing import MODALITIES, image_flags, is_pooled, open_to
from .router_losses import RouterContext

# The routers of this process that have a bias, in the order in which they were made, which all processes share.
_ROUTERS: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_NUMBERS = count()
_hook: Any = None


def watch(router: Any) -> None:
    """Has every optimizer that trains a router change its bias, where it has one."""
    global _hook
    if router.expert_bias is None:
        return
    _ROUTERS[next(_NUMBERS)] = router
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def is_run_again() -> bool:
    """Whether gradient checkpointing runs a layer again, in backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def count_load(expert_TK: Tensor, mask_T: Tensor, num_experts: int) -> Tensor:
    """How many tokens each expert got, (E,), of those whose mask is 1."""
    weight_TK = mask_T[:, None].expand(-1, expert_TK.shape[1])
    return mask_T.new_zeros(num_experts).scatter_add(0, expert_TK.reshape(-1), weight_TK.reshape(-1))


def own_weights(router: Any) -> list[Tensor]:
    """The weights by which a router scores tokens, without those of its text gate, or of an adapter around it: an
    adapter that trains these alone has no place for a bias.
    """
    return list(router.parameters(recurse=False))


def _is_trained(router: Any) -> bool:
    return any(weight.requires_grad for weight in own_weights(router))


@torch.no_grad()
def add_load(router: Any, logits_TE: Tensor, expert_TK: Tensor, context: RouterContext | None) -> None:
    """Notes the load of one training pass.

    Args:
        router: what has chosen.
        logits_TE: (T, E).
        expert_TK: the experts that it chose, (T, K).
        context: the pass'.
    """
    if router.expert_bias is None or context is None or not context.learns or is_run_again():
        return
    if not _is_trained(router):
        return
    mask_T = logits_TE.new_ones(len(logits_TE))
    if context.token_mask is not None:
        mask_T = context.token_mask.reshape(-1).to(mask_T)
    masks = [mask_T]
    if is_pooled(router.moe) and (is_image_T := image_flags(router.moe, context, logits_TE)) is not None:
        masks = [mask_T * is_image_T, mask_T * ~is_image_T]
    load_ME = torch.stack([count_load(expert_TK, one, logits_TE.shape[1]) for one in masks])
    router.load = load_ME if router.load is None else router.load + load_ME


def even_load(moe: Any, load_ME: Tensor) -> Tensor:
    """What each expert would get if tokens were spread evenly over the experts open to them, (E,).

    Args:
        moe: the part's `MoEConfig`.
        load_ME: loads by (MODALITIES, E) where some experts are closed to some tokens, else (1, E).
    """
    if len(load_ME) == 1:
        return load_ME.mean(1).expand(load_ME.shape[1])
    even_E = torch.zeros_like(load_ME[0])
    for modality, load_E in zip(MODALITIES, load_ME, strict=True):
        experts = open_to(moe, modality)
        even_E[experts] += load_E.sum() / len(experts)
    return even_E


def _load_shape(router: Any) -> tuple[int, int]:
    return len(MODALITIES) if is_pooled(router.moe) else 1, len(router.expert_bias)


@torch.no_grad()
def update_expert_bias(routers: Iterable[Any]) -> None:
    """Changes the biases of routers by the loads that they have noted, of all processes, and forgets these.

    Where processes train together each has to call it, with the same routers.
    """
    routers = list(routers)
    is_shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not any(is_shared or router.load is not None for router in routers):
        return
    device = routers[0].expert_bias.device
    noted = [
        torch.zeros(_load_shape(one), device=device) if one.load is None else one.load.to(device) for one in routers
    ]
    if is_shared:
        whole = torch.cat([load_ME.flatten() for load_ME in noted])
        dist.all_reduce(whole)
        pieces = whole.split([load_ME.numel() for load_ME in noted])
        noted = [piece.view(load_ME.shape) for piece, load_ME in zip(pieces, noted, strict=True)]
    for router, load_ME in zip(routers, noted, strict=True):
        missing_E = even_load(router.moe, load_ME) - load_ME.sum(0)
        router.expert_bias += (router.moe.expert_bias_update_rate * missing_E.sign()).to(router.expert_bias.device)
        router.load = None


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Changes the biases of the routers that an optimizer trains, once it has made a step.

    Engines that train flat copies of the weights (DeepSpeed) have an optimizer that knows no weight of the model, and
    take the gradients off them: then the routers are meant that are trained and have no gradient.
    """
    found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer looks for fp16's overflow itself
    if found_inf is not None and bool(found_inf):
        return
    routers = [router for router in (_ROUTERS[number] for number in sorted(_ROUTERS)) if _is_trained(router)]
    if not routers:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = [one for one in routers if any(id(weight) in trained for weight in own_weights(one))]
    for router in own:
        router.has_optimizer = True
    if not own:
        own = [
            one for one in routers if not one.has_optimizer and all(weight.grad is None for weight in own_weights(one))
        ]
    if own:
        update_expert_bias(own)
