"""Routing by which copies of a dense MLP do not compute that MLP: weights that do not sum to one (`norm_topk_prob` is
off: "raw" of MATHS 1), and experts that choose tokens (expert_choice.py), which leave some tokens out.

The proof of such a model runs it with weights that sum to one, where it is exact, so that every tensor is proved; in
that run, whose hidden states are the dense model's, the scale 1 / E[sum of a token's weights] of each raw sparse layer
is measured. Then the routing is as it was asked for, and how far the results are from the dense ones is measured, not
judged.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.expert_choice import add_rows, chooses_tokens, with_images
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.part_images import PartImages
from modeling_vlmoe.router_losses import RouterContext
from modeling_vlmoe.sparse_moe import SparseMoE
from modeling_vlmoe.towers import sparse_blocks

from .probes import hooked

UNSCALED = 1.0


def is_lossy(moe: Any) -> bool:
    """Whether copies of a dense MLP compute something else by this routing."""
    return not moe.norm_topk_prob or moe.routed_scaling_factor != UNSCALED or chooses_tokens(moe)


def lossy_parts(config: Any) -> list[str]:
    """The parts whose routing is lossy."""
    return [part for part in PARTS if config.moe(part) is not None and is_lossy(config.moe(part))]


def describe_lossy(config: Any) -> list[str]:
    """What people are told of parts whose routing is lossy."""
    if not (parts := lossy_parts(config)):
        return []
    named = ", ".join(f"{part}_moe" for part in parts)
    return [f"the routing of {named} changes what the parents compute: how far is measured and written down"]


def is_measured(moe: Any) -> bool:
    """Whether a part's scale is measured: where its weights are raw, and nobody has given it."""
    return not moe.norm_topk_prob and moe.routed_scaling_factor == UNSCALED


def make_exact(model: Any) -> None:
    """Has a model's routers choose experts by weights that sum to one."""
    for _, block in sparse_blocks(model):
        moe = block.router.moe
        if is_lossy(moe):
            moe.norm_topk_prob, moe.routed_scaling_factor = True, UNSCALED
            let_tokens_choose(block)


def let_tokens_choose(block: SparseMoE) -> None:
    """Has the tokens choose in a block whose experts chose tokens."""
    if chooses_tokens(block.router.moe):
        block.router.moe.router_type = "softmax"


def weight_sums(block: SparseMoE, hidden_states: Tensor, context: RouterContext | None) -> Tensor:
    """The sum of each token's weights, (T,), in a block that is given (..., D)."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    if chooses_tokens(block.router.moe):
        if hidden_states.ndim < 3 and (context is None or context.own_images is None):
            context = replace(context or RouterContext(learns=False), own_images=PartImages(1))
        context = with_images(context, hidden_states.shape)
    _, weights, _, *tokens = block.router(x_TD, context)
    return add_rows(weights, tokens[0], len(x_TD))[:, 0] if tokens else weights.sum(-1)


class WeightSums:
    """The mean sum of a token's weights in each sparse layer, over everything that an exact model is given.

    Args:
        exact: The model that runs.
        real: The same with the routing that was asked for.
    """

    def __init__(self, exact: Any, real: Any):
        self.exact, self.real = exact, real
        self.totals: dict[str, tuple[float, int]] = {}

    def _hook(self, path: str, block: SparseMoE) -> Any:
        @torch.no_grad()
        def note(module: Any, args: tuple) -> None:
            context = module.context if module.request is None else module.request.context
            sums_T = weight_sums(block, args[0].float(), context)
            total, count = self.totals.get(path, (0.0, 0))
            self.totals[path] = total + sums_T.double().sum().item(), count + len(sums_T)

        return note

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within it the exact model runs."""
        blocks = {path: block for path, block in sparse_blocks(self.real) if is_measured(block.router.moe)}
        with ExitStack() as stack:
            for path, block in blocks.items():
                exact = self.exact.get_submodule(path)
                stack.enter_context(hooked(exact.register_forward_pre_hook(self._hook(path, block))))
            yield

    def apply(self) -> dict[str, list[float]]:
        """Gives the real model the scales, where every sparse layer of a part has run; gives them by part."""
        found: dict[str, list[float]] = {}
        blocks = dict(sparse_blocks(self.real))
        for part in PARTS:
            moe = self.real.config.moe(part)
            if moe is None or not is_measured(moe):
                continue
            own = {path: block for path, block in blocks.items() if block.router.moe is moe and path in self.totals}
            if not own or len(own) < len(moe.layers or [0]):
                continue
            order = sorted(own, key=lambda path: own[path].router.position)
            found[part] = [self.totals[path][1] / self.totals[path][0] for path in order]
        for part, scales in found.items():
            self.real.config.moe(part).routed_scaling_factor = scales
        return found
