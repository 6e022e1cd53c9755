"""Whether numbers are finite: a step's gradients, and the weights before they are written."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of one that FSDP or ZeRO-3 has split, its share."""
    own: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return getattr(own, "ds_tensor", own)


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are, of what this process holds; whole numbers are."""
    return not tensor.is_floating_point() or bool(torch.isfinite(local(tensor)).all())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients that this process holds, in one number, inf or nan where one of them is."""
    gradients = [local(one.grad).detach() for one in parameters if one.grad is not None]
    gradients = [one for one in gradients if one.numel()]
    return get_total_norm(gradients).float() if gradients else torch.zeros(())


def spoiled(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of tensors that are not finite."""
    return [name for name, tensor in named if not is_finite(tensor)]


def spoiled_weights(model: nn.Module) -> list[str]:
    """The names of trained weights that are not finite; the others do not change."""
    return spoiled((name, one) for name, one in model.named_parameters() if one.requires_grad)


def spoiled_gradients(model: nn.Module) -> list[str]:
    """The names of parameters whose gradients are not finite, those nearest to the loss first."""
    named = [(name, one.grad) for name, one in model.named_parameters() if one.grad is not None]
    return spoiled(reversed(named))
