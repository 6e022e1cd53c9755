"""One forward pass of a model with sparse parts: what its routers are handed, and what they give back.

A composite of ours hands it down by keywords. In a class of the host's, whose forward knows nothing of routers, the
parts are asked beforehand (`PartRequest`), and their answers are added to what the host's forward gives.
"""

from typing import Any

import torch
from torch import Tensor

from .adapter_warnings import warn_of_adapters
from .image_tokens import require_image_tokens
from .modality_routing import is_pooled
from .moe_config import PARTS
from .router_losses import UNSEEN, FollowedLoss, RouterContext, warn_unfollowed, weighted_mean


def micro_batch_share(labels: Tensor | None, num_items_in_batch: Any) -> Tensor | None:
    """This micro-batch's share of the optimizer step, by target tokens, where the trainer says how many the step
    has.
    """
    if labels is None or num_items_in_batch is None:
        return None
    total = torch.as_tensor(num_items_in_batch, device=labels.device).sum().clamp(min=1)
    return (labels[..., 1:] != -100).sum().float() / total  # as the Trainer counts: nothing predicts the first token


class RoutedModel:
    """What a model with sparse parts does beside the host's: a base of model classes, before the host's.

    Attributes:
        micro_batch_share: the weight of one micro-batch's router losses, that is 1 / accumulation steps, where a
            training loop makes its own loss; None where nobody has said.
        followed: the loss that a trainer makes while it makes it (`modeling_vlmoe.finetune.follow_trainer`).
        warns_of_adapters: whether the first training pass warns of an adapter around the model that cannot be meant.
        ignores_text: whether text gates add nothing, and need not be told the text (`text_gate.silence`).
    """

    config: Any
    training: bool
    device: torch.device
    micro_batch_share: float | None = None
    followed: FollowedLoss | None = None
    warns_of_adapters: bool = True
    ignores_text: bool = False
    is_asked: bool = False  # within a pass (see routed_pass.py)
    tower_paths: dict[str, str] = {}  # of a host's VLM: where its towers are

    def router_context(
        self,
        attention_mask: Tensor | None,
        share: Tensor | None = None,
        has_loss: bool = False,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        marks: Tensor | None = None,
        has_images: bool = True,
    ) -> RouterContext | None:
        """The context of this forward pass: in training, where the model has experts; else where routers read it.

        Args:
            attention_mask: (batch, sequence), 1 for real tokens.
            input_ids: (batch, sequence), or `inputs_embeds`, (batch, sequence, width): where images stand is read off
                them.
            share: this micro-batch's share of the optimizer step, where it is known.
            has_loss: whether the task loss is computed by the model, so that it shows what a trainer does to it.
            marks: `mm_token_type_ids`, (batch, sequence), which tell images in `inputs_embeds`.
            has_images: whether this pass is given images.

        Raises:
            ValueError: if routers have to know where images stand, and nobody says.
        """
        moes = {part: self.config.moe(part) for part in PARTS}
        sparse = {part: moe for part, moe in moes.items() if moe is not None}  # dynamo takes no walrus in here
        knows_images = sparse.get("text") is not None and sparse["text"].modality_routing != "shared"
        if not (self.training and sparse and torch.is_grad_enabled()):
            if not (knows_images and is_pooled(sparse["text"])):
                return None
            is_image = require_image_tokens(self, input_ids, inputs_embeds, marks, has_images)
            return RouterContext(learns=False, is_image=is_image)
        warn_of_adapters(self)
        scale = torch.full((), UNSEEN if has_loss else 1.0, device=self.device)
        context = RouterContext(loss_scale=scale, share=torch.ones((), device=self.device))
        context.parts = {part: (moe.router_aux_loss_coef, moe.router_z_loss_coef) for part, moe in sparse.items()}
        if share is not None:
            context.share = share
        elif not has_loss and self.followed is None:
            if self.micro_batch_share is None:
                warn_unfollowed()
            context.share = torch.tensor(self.micro_batch_share or 1.0, device=self.device)
        if self.followed is not None:
            self.followed.add(context)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            context.token_mask = attention_mask.bool()
        if knows_images:
            context.is_image = require_image_tokens(self, input_ids, inputs_embeds, marks, has_images)
        return context

    def weigh_losses(
        self, found: dict[str, Any], device: torch.device
    ) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """The parts' losses, (layers, 2) each, and their weighted sum.

        Args:
            found: for each part, its layers' (balance, z) losses; None or empty where there are none.
            device: of the sum.
        """
        losses = {part: torch.stack(tuple(layers)) for part, layers in found.items() if layers}
        if not losses:
            return None, None
        weighted = [weighted_mean(value.to(device), self.config.moe(part)) for part, value in losses.items()]
        return losses, torch.stack(weighted).sum()
