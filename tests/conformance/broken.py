"""Mistakes that the suite must find: each is one way in which router losses have been lost or doubled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from modeling_vlmoe import router_losses
from modeling_vlmoe.finetune import loss_follower
from modeling_vlmoe.router_losses import RouterContext, RouterLosses, _Attach, _FollowLoss, _FollowPasses

whole_forward, whole_of, whole_share = RouterLosses.forward, RouterContext.of, loss_follower.micro_batch_share


def losses_with(change: Callable[[RouterLosses, list[Any]], None]) -> Any:
    """`RouterLosses.forward`, its module and arguments changed before."""

    def forward(self: RouterLosses, *args: Any) -> Any:
        given = list(args)
        change(self, given)
        return whole_forward(self, *given)

    return patch.object(RouterLosses, "forward", forward)


def not_detached(self: RouterLosses, logits: Any, *rest: Any) -> Any:
    return logits, *whole_forward(self, logits, *rest)[1:]


def drop_context_when_recomputed(self: RouterLosses, given: list[Any]) -> None:
    if torch.is_grad_enabled():  # the reentrant form runs first without
        given[3] = None


def count_layers_once(self: RouterLosses, given: list[Any]) -> None:
    self.num_layers = 1


def share_of_one_process(trainer: Any, *rest: Any) -> Any:
    return whole_share(trainer, *rest) / trainer.accelerator.num_processes


@dataclass(frozen=True)
class Mistake:
    """A mistake and the cell that finds it.

    Attributes:
        what: in a few words.
        trainer: of `KINDS`.
        setting: of `SETTINGS`, or "two processes, DDP".
        make: gives the context in which it is made.
        loss: of `LOSSES`.
    """

    what: str
    trainer: str
    setting: str
    make: Callable[[], Any]
    loss: str = "both"


@contextmanager
def nothing_followed() -> Iterator[None]:
    with patch.object(_FollowLoss, "backward", staticmethod(lambda ctx, g: (g, None, None))):
        with patch.object(_FollowPasses, "backward", staticmethod(lambda ctx, g: (g, None, None))):
            yield


def never_attached() -> Any:
    return patch.object(_Attach, "backward", staticmethod(lambda ctx, g: (g, torch.zeros(()), None)))


MISTAKES = [
    *(
        Mistake("the losses never reach the router", trainer, "one micro-batch", never_attached)
        for trainer in (
            "Trainer",
            "Trainer, compute_loss_func",
            "Trainer, label_smoothing_factor",
            "Trainer, own compute_loss",
            "TRL SFT",
            "TRL DPO",
            "TRL GRPO",
        )
    ),
    *(
        Mistake(
            "accumulation is not followed",
            trainer,
            "accumulation",
            lambda: patch.object(loss_follower, "micro_batch_share", lambda *_: 1.0),
        )
        for trainer in ("Trainer, compute_loss_func", "TRL SFT", "TRL GRPO")
    ),
    Mistake(
        "accumulation is not followed by the model",
        "Trainer",
        "accumulation",
        lambda: patch("modeling_vlmoe.modeling_vlmoe.micro_batch_share", lambda *_: None),
    ),
    *(
        Mistake(
            "the scaler is not followed",
            trainer,
            "fp16's scaler",
            nothing_followed,
        )
        for trainer in ("Trainer", "Trainer, own compute_loss", "TRL DPO")
    ),
    Mistake(
        "a pass with labels is taken for the model's own loss",
        "Trainer, own compute_loss",
        "accumulation",
        nothing_followed,
    ),
    Mistake(
        "recomputation loses the context",
        "TRL SFT",
        "checkpointing, reentrant",
        lambda: losses_with(drop_context_when_recomputed),
    ),
    Mistake(
        "recomputation loses the context",
        "Trainer",
        "checkpointing",
        lambda: losses_with(drop_context_when_recomputed),
    ),
    Mistake(
        "a copy of the router keeps the coefficients it was copied with",
        "TRL SFT",
        "LoRA on experts",
        lambda: patch.object(
            RouterContext, "of", lambda self, part: replace(whole_of(self, part), coefficients=(0.01, 0.001))
        ),
    ),
    Mistake(
        "padding is counted",
        "TRL SFT",
        "accumulation",
        lambda: patch.object(RouterContext, "of", lambda self, part: replace(whole_of(self, part), token_mask=None)),
    ),
    Mistake("layers are summed", "TRL DPO", "accumulation", lambda: losses_with(count_layers_once)),
    Mistake(
        "a trainer's own auxiliary loss counts too",
        "TRL SFT",
        "accumulation",
        lambda: patch.object(RouterLosses, "forward", not_detached),
    ),
    Mistake(
        "z without its square",
        "Trainer",
        "one micro-batch",
        lambda: patch.object(router_losses, "z_loss", lambda logits, mask: logits.logsumexp(-1).mean()),
        loss="z",
    ),
    Mistake(
        "balance without its factor E",
        "Trainer",
        "one micro-batch",
        lambda: patch.object(
            router_losses,
            "balance_loss",
            lambda p, index, mask, whole=router_losses.balance_loss: whole(p, index, mask) / p.shape[-1],
        ),
        loss="balance",
    ),
]
# Made in the processes themselves.
SPREAD_MISTAKE = Mistake(
    "only one process' targets are known",
    "TRL SFT",
    "two processes",
    lambda: patch.object(loss_follower, "micro_batch_share", share_of_one_process),
)


@contextmanager
def made(mistake: Mistake | None) -> Iterator[None]:
    """The mistake while the block runs."""
    if mistake is None:
        yield
        return
    with mistake.make():
        yield
