"""What the processes of a run tell one another, so that all of them stop at the same step for the same reason."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Looked:
    """A step as all processes saw it.

    Attributes:
        loss: the mean over processes.
        is_loss_finite: whether every micro-batch's was, everywhere.
        norm: the largest norm of gradients; nan or inf where one was not finite anywhere.
    """

    loss: float
    is_loss_finite: bool
    norm: float

    @property
    def is_finite(self) -> bool:
        return self.is_loss_finite and bool(torch.isfinite(torch.tensor(self.norm)))


def _is_spread() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def look_together(losses: Tensor, norm: Tensor) -> Looked:
    """One small gathering a step.

    Args:
        losses: of this process' micro-batches, (micro-batches,).
        norm: of this process' gradients.
    """
    own = torch.stack([losses.sum(), torch.isfinite(losses).all().float(), norm.float()])
    seen = [own]
    if _is_spread():
        seen = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(seen, own)
    loss_P, finite_P, norm_P = torch.stack(seen).cpu().unbind(-1)
    largest = norm_P.max() if torch.isfinite(norm_P).all() else norm_P[~torch.isfinite(norm_P)][0]
    return Looked(loss_P.mean().item(), bool(finite_P.all()), largest.item())


def all_say(said: Any) -> list[Any]:
    """What each process says, in the order of their ranks."""
    if not _is_spread():
        return [said]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, said)
    return found
