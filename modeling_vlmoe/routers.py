"""Routers: which experts a token is sent to, and with what weights (MATHS 1 to 5).

From a token's logits, one per expert: some experts may be closed to it (modality_routing.py); what is left may be
normalised; scores are their softmax or their sigmoids; the experts with the best scores are chosen, by a score that a
bias may raise or lower (expert_bias.py); and the weights are the chosen scores, which sum to one where they are
renormalised. With "expert_choice" experts choose tokens instead (expert_choice.py).

Shapes: T tokens, D width, E experts, K experts per token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .expert_bias import add_load, watch
from .expert_choice import choose_tokens, chooses_tokens
from .modality_routing import bar_closed, has_two_routers, image_flags, open_experts
from .moe_config import experts_in
from .router_losses import RouterContext
from .text_gate import TextGate

NORM_EPSILON = 1e-6
# What a router holds, which stays in float32 whatever the model is loaded in.
ROUTER_WEIGHTS = ("router.weight", "router.image_weight", "router.expert_bias", "router.text_gate")


def scaling_factor(moe: Any, position: int) -> float:
    """What the routing weights of one sparse layer, the how-manyth of its part, are multiplied by."""
    factor = moe.routed_scaling_factor
    return factor[position] if isinstance(factor, list) else factor


def normalize_logits(logits_TE: Tensor, spread: float, open_TE: Tensor | None) -> Tensor:
    """Logits with mean 0 and a given standard deviation over the experts open to a token (Skywork-MoE, 2406.06563,
    eq. 5).

    Args:
        logits_TE: (T, E).
        spread: the standard deviation, "lambda".
        open_TE: the open experts, (T, E); None where all are.
    """
    is_open = torch.ones_like(logits_TE) if open_TE is None else open_TE.to(logits_TE.dtype)
    number = is_open.sum(-1, keepdim=True)
    centred = (logits_TE - (logits_TE * is_open).sum(-1, keepdim=True) / number) * is_open
    variance = centred.square().sum(-1, keepdim=True) / number
    return spread * centred * (variance + NORM_EPSILON**2).rsqrt()


class Router(nn.Module):
    """Scores every expert for every token and keeps the best K, in float32 whatever the model's dtype.

    Args:
        width: D.
        moe: the part's `MoEConfig`.
        position: the how-manyth sparse layer of the part this is.
        text_width: width of the LLM's word embeddings, which a text gate reads.

    Attributes:
        weight: (E, D); where image tokens have a router of their own (`modality_routing="intra_inter"`), that of the
            other tokens.
        image_weight: (E, D), that of image tokens.
        text_gate: what adds to the logits, with `router_type="attention"`.
        expert_bias: (E,), what is added to the scores when experts are chosen (`use_expert_bias`).
        load: the assignments since the last optimizer step, (modalities, E), in training with a bias; never saved.

    Raises:
        ValueError: if there is to be a text gate, and the text's width is not known.
    """

    expert_bias: Tensor | None
    has_optimizer: bool = False  # whether an optimizer is known that trains it

    def __init__(self, width: int, moe: Any, position: int = 0, text_width: int | None = None):
        super().__init__()
        self.moe, self.position, num_experts = moe, position, experts_in(moe, position)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.image_weight: Tensor | None = None
        if has_two_routers(moe):
            self.image_weight = nn.Parameter(torch.empty(num_experts, width))
        self.text_gate: TextGate | None = None
        if moe.router_type == "attention":
            if text_width is None:
                raise ValueError(
                    'router_type is "attention", which reads the LLM\'s words, but their width is not known. Pass '
                    "text_width, or build the whole vision-language model."
                )
            self.text_gate = TextGate(num_experts, text_width, moe.router_text_size)
        self.register_buffer("expert_bias", torch.zeros(num_experts) if moe.use_expert_bias else None)
        self.load: Tensor | None = None
        watch(self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"load": None, "has_optimizer": False}  # a copy has been sent no token

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        bias = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.expert_bias = bias.to(moved.device, torch.float32)  # half precision would round its small steps away
        return self

    def reset_parameters(self) -> None:
        """Uniform with variance 1 / (3 D): the spread of the logits does not depend on the width (MATHS 3)."""
        bound = self.weight.shape[1] ** -0.5
        for weight in (self.weight, self.image_weight):
            if weight is not None:
                init.uniform_(weight, -bound, bound)
        if self.expert_bias is not None:
            init.zeros_(self.expert_bias)

    def logits(self, x_TD: Tensor, context: RouterContext | None) -> Tensor:
        """The logits, (T, E); of an expert that is closed to a token the lowest number."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        is_image_T = image_flags(self.moe, context, x_TD)
        if self.image_weight is not None and is_image_T is not None:
            of_images_TE = F.linear(x_TD.float(), self.image_weight.float())
            logits_TE = torch.where(is_image_T[:, None], of_images_TE, logits_TE)
        if self.text_gate is not None:
            images = None if context is None else context.own_images
            logits_TE = logits_TE + self.text_gate(images, logits_TE.shape[0])
        open_TE = open_experts(self.moe, logits_TE, is_image_T)
        if (spread := self.moe.router_logit_norm) is not None:
            logits_TE = normalize_logits(logits_TE, spread, open_TE)
        if open_TE is not None:
            logits_TE = logits_TE.masked_fill(~open_TE, torch.finfo(logits_TE.dtype).min)
        return logits_TE

    def choose(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (T, K) and the chosen experts (T, K)."""
        is_sigmoid = self.moe.router_type == "sigmoid"
        score_TE = logits_TE.sigmoid() if is_sigmoid else logits_TE.softmax(-1)
        if (bias := self.expert_bias) is None:
            weight_TK, expert_TK = bar_closed(self.moe, score_TE, logits_TE).topk(self.moe.num_experts_per_tok)
        else:
            chosen_by_TE = bar_closed(self.moe, score_TE.detach() + bias.float(), logits_TE)
            expert_TK = chosen_by_TE.topk(self.moe.num_experts_per_tok).indices
            weight_TK = score_TE.gather(1, expert_TK)
        if self.moe.norm_topk_prob:
            # The same as w / sum(w), and never 0 / 0.
            if is_sigmoid:
                weight_TK = F.logsigmoid(logits_TE.gather(1, expert_TK)).softmax(-1)
            elif bias is not None:
                weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
            else:  # the best expert has 1 / E or more
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return weight_TK, expert_TK

    def choose_tokens(self, logits_TE: Tensor, context: RouterContext) -> tuple[Tensor, Tensor, Tensor]:
        """The rows in which experts choose tokens: weights (R, 1), experts (R, 1) and tokens (R,)."""
        moe, mask = self.moe, context.token_mask
        assert context.own_images is not None
        mask_T = None if mask is None else mask.reshape(-1).to(logits_TE.device)
        return choose_tokens(logits_TE, moe.num_experts_per_tok, context.own_images, mask_T, moe.norm_topk_prob)

    def forward(self, x_TD: Tensor, context: RouterContext | None = None) -> tuple[Tensor, ...]:
        """Routes the MLP's input, (T, D).

        Args:
            x_TD: the tokens.
            context: what a router may need beyond them.

        Returns:
            The logits (T, E), float32; the weights (T, K), float32; the chosen experts (T, K). Where experts choose
            tokens: the logits, the weights (R, 1), the experts (R, 1), and the tokens (R,).
        """
        with torch.autocast(device_type=x_TD.device.type, enabled=False):  # bf16 ties would flip the choice
            logits_TE = self.logits(x_TD, context)
            token_R: tuple[Tensor, ...] = ()
            if chooses_tokens(self.moe):
                assert context is not None
                weight_TK, expert_TK, *token_R = self.choose_tokens(logits_TE, context)  # type: ignore[assignment]
            else:
                weight_TK, expert_TK = self.choose(logits_TE)
            if (factor := scaling_factor(self.moe, self.position)) != 1.0:
                weight_TK = weight_TK * factor
        add_load(self, logits_TE, expert_TK, context)
        return logits_TE, weight_TK, expert_TK, *token_R
