"""What to do about a step that was not finite, by what was not finite first."""

from typing import Any

from .diagnosis import GRADIENT, INPUT, LOSS, RESULT, TARGETS, UPDATE, WEIGHT, Cause

DATA = "Check that row: its images open, and the image processor's mean and std are numbers; or leave it out."
LABELS = "Give rows with an answer, and check that the collator's labels are not all -100."
LOADED = "The model was loaded like that: check its checkpoint, or train from another one."


def _given(args: Any, word: str) -> str:
    """A setting as the command takes it: a chain's by its stage, which has begun with another value."""
    prefix = getattr(args, "stage_prefix", None)
    return word if prefix is None else f"{prefix}{word} force=true"


def _rate(rate: float | None, args: Any) -> str:
    tenth = "" if not rate else f" ({rate:.3g}; try {_given(args, f'learning_rate={rate / 10:.3g}')})"
    return f"Lower the learning rate{tenth}."


def _clip(args: Any) -> str:
    norm = args.max_grad_norm
    if not norm or norm > 1:
        return f"Clip gradients: {_given(args, 'max_grad_norm=1.0')} (it is {norm})."
    return f"Clip gradients harder: {_given(args, f'max_grad_norm={norm / 10:.3g}')} (it is {norm})."


def _bfloat16(args: Any) -> str:
    ways = " or ".join(_given(args, word) for word in ("dtype=bfloat16", "bf16=true"))
    return f"Train in bfloat16, whose range is float32's: {ways}, in the place of float16."


def _float32(args: Any) -> str:
    return f"Train in float32 ({_given(args, 'dtype=float32')}) to see whether rounding does it."


def remedies(cause: Cause, args: Any, rate: float | None, step: int) -> list[str]:
    """What to try, the likeliest first.

    Args:
        cause: what was not finite first.
        args: the run's arguments.
        rate: the learning rate.
        step: the optimizer step, counted from 1.
    """
    if cause.kind == INPUT:
        return [DATA]
    if cause.kind == TARGETS:
        return [LABELS]
    if cause.kind == WEIGHT and step == 1:
        return [LOADED]
    found = [_bfloat16(args)] if cause.is_half or getattr(args, "fp16", False) else []
    if cause.kind in (WEIGHT, UPDATE, RESULT, GRADIENT, LOSS):
        found.append(_rate(rate, args))
        if not args.get_warmup_steps(max(args.max_steps, 1000)):
            found.append(f"Begin with a warm-up: {_given(args, 'warmup_steps=0.03')}.")
        found.append(_clip(args))
    found.append("Leave out the rows that are named, if the step before them was made as usual.")
    return found if len(found) > 2 else [*found, _float32(args)]
