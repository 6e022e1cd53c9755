"""The router's auxiliary losses, and how they reach the router under any trainer.

A trainer may never look at the loss that `forward` returns (TRL rebuilds it from the base model's outputs), so the
losses are attached where they arise: an identity on the routing weights whose backward adds the losses' gradient. The
gradient is scaled by what the trainer does to the task loss (fp16's scaler, a division by accumulation steps), which
`follow_loss` observes on that loss: in the model where it computes the loss itself, else in the trainer
(`modeling_vlmoe.finetune.follow_trainer`).

Definition (MATHS 4), per sparse layer, micro-batch and process, padding left out: T real tokens, E experts, K chosen
per token, p = softmax(router logits), F_i = assignments to expert i / (T K), P_i = mean of p_i:

    balance = E sum_i F_i P_i                 (Switch Transformers, 2101.03961, eq. 4; 1 when routing is uniform)
    z       = mean of logsumexp(logits)^2     (ST-MoE, 2202.08906, eq. 5)

Of sigmoid routers p is the sigmoids over their sum. Where experts choose tokens (expert_choice.py), they get the same
load by construction: balance is 0. Where modalities are balanced apart (modality_routing.py), balance
is computed over the tokens of each, with E the experts open to them, and averaged by their shares of the real tokens.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .hollow_tensors import is_hollow
from .modality_routing import MODALITIES, image_flags, num_open
from .part_images import PartImages

logger = logging.get_logger(__name__)


def _one() -> Tensor:
    return torch.ones((), dtype=torch.float32)


@dataclass
class RouterContext:
    """What a router needs beyond the token, handed down to each sparse layer for one forward pass.

    Attributes:
        token_mask: (batch, sequence), true for real tokens; None where all are real.
        share: this micro-batch's share of the optimizer step, a scalar; losses are averaged over micro-batches by it.
        loss_scale: what backward multiplied the task loss by, a scalar that `follow_loss` fills in during backward.
        parts: each sparse part's (balance, z) coefficients, read off the configuration for this pass: trainers write
            them, and a module may be a copy (PEFT's `modules_to_save`), as would be a configuration that it held.
        coefficients: those of the part that the context was handed to.
        is_followed: whether a trainer's own loss tells the scale too.
        learns: whether losses are computed; else the context is there for what routers read of it alone.
        is_image: (batch, sequence), true for the LLM's image tokens; None where it is not known.
        images: for "vision" and "connector", whose tokens they see; left out where no router of the part reads it.
        own_images: those of the part that the context was handed to.
    """

    token_mask: Tensor | None = None
    share: Tensor = field(default_factory=_one)
    loss_scale: Tensor = field(default_factory=_one)
    parts: dict[str, tuple[float, float]] = field(default_factory=dict)
    coefficients: tuple[float, float] = (0.0, 0.0)
    is_followed: bool = False
    learns: bool = True
    is_image: Tensor | None = None
    images: dict[str, PartImages] = field(default_factory=dict)
    own_images: PartImages | None = None

    @property
    def is_read(self) -> bool:
        """Whether routers need it to choose."""
        return self.is_image is not None or self.own_images is not None

    def is_image_token(self) -> Tensor | None:
        """Which of the part's tokens are of images, (tokens,); None where it is not known."""
        return None if self.is_image is None else self.is_image.reshape(-1)

    def image_of_token(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """Which image each of the part's tokens is of, (tokens,); None where it is not known."""
        return None if self.own_images is None else self.own_images.of_token(num_tokens, device)

    def of(self, part: str) -> "RouterContext":
        """The context as "text", "vision" or "connector" gets it; of images every token is real."""
        own = replace(self, coefficients=self.parts.get(part, (0.0, 0.0)), own_images=self.images.get(part), images={})
        if part != "text":
            own.token_mask = own.is_image = None
        return own


def probabilities(logits_TE: Tensor, router_type: str) -> Tensor:
    """What the load-balancing loss takes as a token's shares of the experts, (T, E): the softmax, or the sigmoids over
    their sum (DeepSeek-V3, 2412.19437, eq. 18).
    """
    if router_type == "sigmoid":
        return F.logsigmoid(logits_TE).softmax(-1)
    return logits_TE.softmax(-1)


def balance_loss(probability_TE: Tensor, expert_TK: Tensor, mask_T: Tensor) -> Tensor:
    """The load-balancing loss of one layer.

    Args:
        probability_TE: router probabilities, (tokens, experts).
        expert_TK: chosen experts, (tokens, top-k).
        mask_T: 1.0 for real tokens, 0.0 for padding, (tokens,).

    Returns:
        A scalar; 1 when routing is uniform. Its gradient flows through the probabilities only.
    """
    num_experts, num_picked = probability_TE.shape[-1], expert_TK.shape[-1]
    num_tokens = mask_T.sum().clamp(min=1.0)
    assigned_E = torch.zeros(num_experts, dtype=mask_T.dtype, device=mask_T.device)
    assigned_E = assigned_E.scatter_add(0, expert_TK.reshape(-1), mask_T[:, None].expand(-1, num_picked).reshape(-1))
    mean_probability_E = (probability_TE * mask_T[:, None]).sum(0) / num_tokens
    return num_experts * (assigned_E / (num_tokens * num_picked) * mean_probability_E).sum()


def balance_by_modality(
    moe: Any, probability_TE: Tensor, expert_TK: Tensor, mask_T: Tensor, is_image_T: Tensor
) -> Tensor:
    """The load-balancing loss of one layer, of each modality apart; the mean over its tokens' shares (MoIIE,
    2508.09779, sec. 3.3, which adds the two up).

    Args:
        moe: the part's `MoEConfig`.
        probability_TE: as of `balance_loss`.
        expert_TK: likewise.
        mask_T: likewise.
        is_image_T: which tokens are of images, (tokens,).
    """
    total, num_experts = probability_TE.new_zeros(()), probability_TE.shape[-1]
    for modality in MODALITIES:
        own_T = mask_T * (is_image_T == (modality == "image"))
        share = own_T.sum() / mask_T.sum().clamp(min=1.0)
        found = balance_loss(probability_TE, expert_TK, own_T)
        total = total + share * found * num_open(moe, modality) / num_experts
    return total


def z_loss(logits_TE: Tensor, mask_T: Tensor) -> Tensor:
    """The router z-loss of one layer: the mean squared logsumexp of the real tokens' logits, (tokens, experts)."""
    return (logits_TE.logsumexp(-1).square() * mask_T).sum() / mask_T.sum().clamp(min=1.0)


# The scale of a context whose loss has not passed backward yet, where the model computes the loss.
UNSEEN = -1.0
_looks_for_unseen = True


class _Attach(torch.autograd.Function):
    """The identity on `weights`; its backward gives `loss` the gradient that the task loss has."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, loss_scale: Tensor) -> Tensor:
        ctx.loss_scale = loss_scale  # not saved as a tensor: it is written during backward, before it is read here
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        if not is_hollow(gradient):
            warn_unseen(ctx.loss_scale)
        scale = ctx.loss_scale.to(device=gradient.device, dtype=torch.float32)
        return gradient, torch.where(scale == UNSEEN, torch.ones_like(scale), scale), None


class _FollowLoss(torch.autograd.Function):
    """The identity on the task loss; its backward notes what the trainer multiplied the loss by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, loss_scale: Tensor, is_followed: bool) -> Tensor:
        ctx.loss_scale, ctx.is_followed = loss_scale, is_followed
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        seen = gradient.detach()
        if ctx.is_followed:  # DDP gives zero to outputs that are not trained: then the trainer's own loss holds
            seen = torch.where(seen == 0, ctx.loss_scale.to(seen), seen)
        ctx.loss_scale.copy_(seen)
        return gradient, None, None


class _FollowPasses(torch.autograd.Function):
    """The identity on a trainer's own loss; its backward tells every pass' context what it comes to."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, contexts: list[RouterContext], share: Tensor) -> Tensor:
        ctx.contexts, ctx.share = contexts, share
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        for context in ctx.contexts:
            scale = gradient.detach() * ctx.share / len(ctx.contexts)
            # A pass with labels has been given its share already; where its own loss counts, that overwrites this.
            context.loss_scale.copy_(scale / context.share.clamp(min=torch.finfo(torch.float32).tiny))
        return gradient, None, None


def follow_loss(loss: Tensor, context: RouterContext | None) -> Tensor:
    """The task loss, watched: the attached losses are scaled in backward as the trainer scales this one."""
    return loss if context is None else _FollowLoss.apply(loss, context.loss_scale, context.is_followed)


class FollowedLoss:
    """A loss that a trainer makes itself, out of one or several passes of the model.

    Attributes:
        contexts: of the passes in training that it was made of; they weigh alike.
    """

    def __init__(self) -> None:
        self.contexts: list[RouterContext] = []

    def add(self, context: RouterContext) -> None:
        """Takes up a pass."""
        context.is_followed = True
        self.contexts.append(context)

    def follow(self, loss: Tensor, share: Tensor | float) -> Tensor:
        """The loss, watched.

        Args:
            loss: what the trainer has made.
            share: the micro-batch's share of the optimizer step, where what the trainer does to the loss does not say.
        """
        return _FollowPasses.apply(loss, self.contexts, torch.as_tensor(share))


HELP = (
    "With a trainer (TRL's, compute_loss_func, label_smoothing_factor, a compute_loss of your own) add one line "
    "before train(): `from modeling_vlmoe.finetune import follow_trainer; follow_trainer(trainer)`."
)


def warn_unfollowed() -> None:
    """Says once that nothing tells the router losses what a trainer does to its own loss."""
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "The model is trained by a loss that it does not compute (forward got no labels). Its router losses reach "
            f"the routers, but do not follow gradient accumulation or fp16 loss scaling. {HELP} In a loop of your own "
            "set `micro_batch_share` of the VLMoEModel (`model.model`) to 1 / accumulation steps."
        )


def warn_unseen(loss_scale: Tensor) -> None:
    """Says once that the loss which the model computed is not the one that is trained; looked for in one step only."""
    global _looks_for_unseen
    if torch.compiler.is_compiling() or not _looks_for_unseen:
        return
    _looks_for_unseen = False
    if loss_scale.item() in (UNSEEN, 0.0):  # DDP gives zero to outputs that are not trained
        logger.warning(
            "The model computed a loss (forward got labels), but another one is trained. Its router losses reach the "
            "routers, but do not follow gradient accumulation or fp16 loss scaling. "
            f"{HELP} In a loop of your own pass no labels."
        )


class RouterLosses(nn.Module):
    """Computes one layer's losses and attaches them; a module of its own so that the host's output recorder finds it.

    Args:
        num_layers: sparse layers of the part; the part's loss is the mean over them.
    """

    def __init__(self, num_layers: int):
        super().__init__()
        self.num_layers = num_layers

    def forward(
        self,
        logits_TE: Tensor,
        weight_TK: Tensor,
        expert_TK: Tensor,
        context: RouterContext | None,
        is_trained: bool = True,
        moe: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attaches the losses, where there is a context, that is in training.

        Args:
            logits_TE: router logits, float32, (tokens, experts).
            weight_TK: routing weights, (tokens, top-k).
            expert_TK: chosen experts, (tokens, top-k).
            context: the forward pass' context; its mask covers the same tokens.
            moe: the part's `MoEConfig`; None for a softmax over all experts.
            is_trained: whether the router learns; a frozen router's losses are reported, but not attached, since they
                could only move whatever is trained below it.

        Returns:
            What is reported, the detached logits, so that a trainer's own auxiliary term carries no second gradient;
            the weights, unchanged in value; and the detached (balance, z) losses, (2,), or None.
        """
        if context is None or not context.learns:
            return logits_TE.detach(), weight_TK, None
        mask_T = logits_TE.new_ones(logits_TE.shape[0])
        if context.token_mask is not None:
            mask_T = context.token_mask.reshape(-1).to(mask_T)
        probability_TE = probabilities(logits_TE, "softmax" if moe is None else moe.router_type)
        is_image_T = None if moe is None else image_flags(moe, context, logits_TE)
        if moe is not None and moe.router_type == "expert_choice":
            balance = logits_TE.new_zeros(())  # experts get the same load by construction
        elif is_image_T is None:
            balance = balance_loss(probability_TE, expert_TK, mask_T)
        else:
            balance = balance_by_modality(moe, probability_TE, expert_TK, mask_T, is_image_T)
        z = z_loss(logits_TE, mask_T)
        reported = torch.stack([balance, z]).detach()
        if not is_trained:
            return logits_TE.detach(), weight_TK, reported
        balance_weight, z_weight = context.coefficients
        weighted = balance_weight * balance + z_weight * z
        share = context.share.to(weighted.device)
        weight_TK = _Attach.apply(weight_TK, weighted * share / self.num_layers, context.loss_scale)
        return logits_TE.detach(), weight_TK, reported


def weighted_mean(losses: Tensor, moe: Any) -> Tensor:
    """A part's loss from its layers' (layers, 2) balance and z values: the mean over layers, by the part's
    coefficients.
    """
    coefficients = losses.new_tensor([moe.router_aux_loss_coef, moe.router_z_loss_coef])
    return (losses.mean(0) * coefficients).sum()
