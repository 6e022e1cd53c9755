"""What in a step was not finite first: an input, a weight, what a module gave, or a gradient.

The weights are those before the step, so its batch is run once more, without gradients, and each module's result is
looked at. Where layers are gathered by all processes, each of them does so.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from .finite import is_finite, local, spoiled_gradients, spoiled_weights
from .places import Places

logger = logging.getLogger(__name__)

INPUT, TARGETS, WEIGHT, RESULT, GRADIENT, LOSS = "input", "targets", "weight", "result", "gradient", "loss"
UPDATE = "update"  # a weight, by the step itself
IGNORED = -100


@dataclass
class Cause:
    """What was not finite first.

    Attributes:
        kind: INPUT, TARGETS (none), WEIGHT, UPDATE, RESULT (of a module), GRADIENT or LOSS (alone).
        words: what, as the end of "First not finite: ...".
        rows: which rows of the batch it shows in, by their place; all where None.
        is_half: whether it was computed in float16.
    """

    kind: str
    words: str
    rows: list[int] | None = None
    is_half: bool = False


@dataclass
class _Seen:
    """What was seen of a pass."""

    name: str | None = None
    dtype: torch.dtype | None = None
    largest: float = 0.0
    rows: list[int] | None = field(default=None)


def _floats(values: Any) -> list[Tensor]:
    found = [one for one in tree_leaves(values) if isinstance(one, Tensor) and one.is_floating_point()]
    return [one for one in (local(tensor).detach() for tensor in found) if one.numel()]


@contextmanager
def _looked_at(model: nn.Module, seen: _Seen) -> Iterator[None]:
    """Within it the first module whose result is not finite is noted; inner ones come before those around them."""

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if seen.name is None and not all(is_finite(one) for one in _floats(output)):
                given = _floats((args, kwargs))
                seen.name = name
                seen.dtype = _floats(output)[0].dtype
                seen.largest = max((one[torch.isfinite(one)].abs().amax().item() for one in given), default=0.0)

        return look

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_again(trainer: Trainer, inputs: dict[str, Any]) -> _Seen:
    """One pass over a batch, looked at; randomness is put back."""
    model: Any = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    bare: Any = trainer.model  # DeepSpeed's engine calls it something else
    seen, outputs = _Seen(), cast(Any, None)
    with torch.random.fork_rng(), torch.no_grad(), _looked_at(bare, seen), trainer.compute_loss_context_manager():
        try:
            outputs = model(**trainer._prepare_inputs(dict(inputs)))
        except (RuntimeError, ValueError) as error:  # it was to explain another failure
            logger.info("The batch could not be run again: %s", error)
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if isinstance(logits, Tensor):
        bad_B = ~torch.isfinite(local(logits)).flatten(1).all(-1)
        if bad_B.any():
            seen.rows = bad_B.nonzero().flatten().tolist()
    return seen


def _is_without_targets(inputs: dict[str, Any]) -> bool:
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and not bool((labels[..., 1:] != IGNORED).any())


def _bad_input(inputs: dict[str, Any]) -> str | None:
    """The first input that is not finite, and which of its first dimension: of images, which image."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not is_finite(value):
            bad = (~torch.isfinite(value)).flatten(1).any(-1).nonzero().flatten().tolist() if value.ndim > 1 else []
            which = f", number {', '.join(str(one + 1) for one in bad[:8])} of {len(value)}" if bad else ""
            return f"the input {name}{which}"
    return None


def find_cause(trainer: Trainer, inputs: dict[str, Any], is_loss_finite: bool) -> Cause:
    """What was not finite first in a step that was not made.

    Every process of a run calls it, since all of them take part in a pass where layers are gathered.

    Args:
        trainer: in the step, its gradients not yet clipped, its weights those before.
        inputs: a batch of the step, one whose loss was not finite if there was one.
        is_loss_finite: whether it was finite here.
    """
    model: Any = trainer.model
    name_of, seen = Places(model), _run_again(trainer, inputs)
    if bad := _bad_input(inputs):
        return Cause(INPUT, bad, seen.rows)
    if weights := spoiled_weights(model):
        more = f" (and {len(weights) - 1} more weights)" if len(weights) > 1 else ""
        return Cause(WEIGHT, f"the weights of {name_of(weights[0])}{more}")
    if not is_loss_finite and _is_without_targets(inputs):
        return Cause(TARGETS, "the loss: no token of the batch is a target, all labels are -100")
    if not is_loss_finite and seen.name is not None and seen.dtype is not None:
        words = (
            f"what {name_of(seen.name)} computes, from numbers up to {seen.largest:.3g}, in "
            f"{str(seen.dtype).removeprefix('torch.')}, whose largest number is {torch.finfo(seen.dtype).max:.3g}"
        )
        return Cause(RESULT, words, seen.rows, seen.dtype is torch.float16)
    if gradients := spoiled_gradients(model):
        more = f" (and of {len(gradients) - 1} more weights)" if len(gradients) > 1 else ""
        is_half = dict(model.named_parameters())[gradients[0]].dtype is torch.float16
        return Cause(GRADIENT, f"the gradient of {name_of(gradients[0])}{more}", is_half=is_half)
    return Cause(LOSS, "the loss, where every weight, gradient and result seen by this process is finite")
