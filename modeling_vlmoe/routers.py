"""Routers: which experts a token is sent to, and with what weights (MATHS 1 to 5).

From a token's logits, one per expert: some experts may be closed to it (modality_routing.py); what is left may be
normalised; scores are their softmax or their sigmoids; the experts with the best scores are chosen, by a score that a
bias may raise or lower; and the weights are the chosen scores, which sum to one where they are renormalised.

Shapes: T tokens, D width, E experts, K experts per token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .modality_routing import has_two_routers, open_experts
from .moe_config import experts_in
from .router_losses import RouterContext
from .text_gate import TextGate

NORM_EPSILON = 1e-6


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

    Raises:
        ValueError: if there is to be a text gate, and the text's width is not known.
    """

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

    def reset_parameters(self) -> None:
        """Uniform with variance 1 / (3 D): the spread of the logits does not depend on the width (MATHS 3)."""
        bound = self.weight.shape[1] ** -0.5
        for weight in (self.weight, self.image_weight):
            if weight is not None:
                init.uniform_(weight, -bound, bound)

    def logits(self, x_TD: Tensor, context: RouterContext | None) -> Tensor:
        """The logits, (T, E); of an expert that is closed to a token the lowest number."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        is_image_T = None if context is None else context.is_image_token()
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
        weight_TK, expert_TK = score_TE.topk(self.moe.num_experts_per_tok)
        if self.moe.norm_topk_prob:
            if is_sigmoid:  # the same as w / sum(w), and never 0 / 0
                weight_TK = F.logsigmoid(logits_TE.gather(1, expert_TK)).softmax(-1)
            else:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        if (factor := scaling_factor(self.moe, self.position)) != 1.0:
            weight_TK = weight_TK * factor
        return weight_TK, expert_TK

    def forward(self, x_TD: Tensor, context: RouterContext | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Routes the MLP's input, (T, D).

        Args:
            x_TD: the tokens.
            context: what a router may need beyond them.

        Returns:
            The logits (T, E), float32; the weights (T, K), float32; the chosen experts (T, K).
        """
        with torch.autocast(device_type=x_TD.device.type, enabled=False):  # bf16 ties would flip the choice
            logits_TE = self.logits(x_TD, context)
            weight_TK, expert_TK = self.choose(logits_TE)
        return logits_TE, weight_TK, expert_TK
