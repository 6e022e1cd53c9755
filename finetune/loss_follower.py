"""Router losses under a trainer that makes its own loss, in one line:

    follow_trainer(trainer)

The losses are attached inside the blocks (`modeling_vlmoe.router_losses`). Where the model computes the task loss,
they follow what the trainer does to it. Where the trainer computes it (TRL's trainers, `compute_loss_func`,
`label_smoothing_factor`), its `compute_loss` is watched here: the losses are scaled as the trainer scales its own loss
(accumulation, fp16's scaler, processes), and a micro-batch weighs in them as it weighs in the task loss.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from modeling_vlmoe.router_losses import FollowedLoss

from .callbacks import log_router_load
from .router_load import find_body
from .routing_alarms import AlarmLimits


def is_scaled(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Whether the loss that `compute_loss` gives is scaled for accumulation already, as the Trainer decides it."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (
        trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    ) or trainer.compute_loss_func is not None


def find_targets(trainer: Trainer, inputs: Any) -> Tensor | None:
    """What the trainer counts as targets: -100 is none; None where a batch has no labels."""
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("labels"), Tensor):
        return None
    if "shift_labels" in inputs:
        return inputs["shift_labels"]
    return inputs["labels"][..., 1:] if trainer._loss_shifts_labels else inputs["labels"]


def micro_batch_share(trainer: Trainer, targets: Tensor | None, num_items_in_batch: Any) -> Tensor | float:
    """What the scale of the loss does not say of a micro-batch's share of the step.

    Args:
        trainer: in a training step.
        targets: of the micro-batch, -100 where there is none; or None.
        num_items_in_batch: targets of the whole step, where the trainer counts them.
    """
    if not is_scaled(trainer, num_items_in_batch):
        return 1.0
    if num_items_in_batch is None or targets is None:
        return 1.0 / trainer.current_gradient_accumulation_steps
    total = torch.as_tensor(num_items_in_batch, device=targets.device).sum().clamp(min=1)
    # Where the targets of all processes are counted, `compute_loss` undoes the average of their gradients.
    is_global = trainer.args.average_tokens_across_devices
    num_processes = trainer.accelerator.num_processes // trainer.get_tp_size() if is_global else 1
    return (targets != -100).sum() * num_processes / total


def follow_trainer(
    trainer: Trainer, log_load: bool = True, has_alarms: bool = True, limits: AlarmLimits | None = None
) -> None:
    """Makes a vlmoe model's router losses follow a trainer, and be logged.

    Args:
        trainer: transformers' Trainer or one of TRL's, before `train()`.
        log_load: whether the experts' load and the losses are logged, per layer.
        has_alarms: whether then a warning is given, once each, of what is wrong with the routing.
        limits: when; see `AlarmLimits`.

    Raises:
        ValueError: if the trainer's model is not a vlmoe model.
    """
    compute_loss = trainer.compute_loss

    def followed(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not model.training:
            return compute_loss(model, inputs, *args, **kwargs)
        targets = find_targets(trainer, inputs)  # `compute_loss` may take them out
        body = find_body(model)
        loss = body.followed = FollowedLoss()
        try:
            result = compute_loss(model, inputs, *args, **kwargs)
        finally:
            body.followed = None
        share = micro_batch_share(trainer, targets, kwargs.get("num_items_in_batch"))
        if isinstance(result, tuple):
            return loss.follow(result[0], share), *result[1:]
        return loss.follow(result, share)

    find_body(cast(nn.Module, trainer.model))
    trainer.compute_loss = followed  # type: ignore[method-assign]
    if log_load:
        log_router_load(trainer, has_alarms, limits)
