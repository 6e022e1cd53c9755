"""What a dense LM makes of its last hidden states: nearly always one Linear, whose bias and whose maths differ.

The maths is keyed on the configuration attribute that holds its number, so that a family that follows another needs
no row. Where families mean different things by one attribute, the rarer meaning is an exception.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

Maths = Callable[[Tensor, float], Tensor]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Logits kept within the cap, smoothly."""
    return torch.tanh(logits / cap) * cap


def divide(logits: Tensor, scale: float) -> Tensor:
    """Logits by the scale."""
    return logits / scale


def multiply(logits: Tensor, scale: float) -> Tensor:
    """Logits times the scale."""
    return logits * scale


SCALES = (divide, multiply)  # by one they change nothing
HEAD_MATHS: dict[str, Maths] = {
    "final_logit_softcapping": soft_cap,  # Gemma-2, Gemma-3, VaultGemma, NanoChat
    "logits_soft_cap": soft_cap,  # RecurrentGemma
    "output_logit_soft_cap": soft_cap,  # xLSTM
    "logits_scaling": divide,  # Granite, MiniCPM3
    "logit_scale": multiply,  # Cohere
    "lm_head_multiplier": multiply,  # Falcon-H1
}
# (attribute, model type): what this family means by it; None: it has the attribute, and its head does not read it.
HEAD_EXCEPTIONS: dict[tuple[str, str], Maths | None] = {
    ("logits_scaling", "hyperclovax"): multiply,
    ("logit_scale", "mpt"): None,
}


def head_maths(config: PreTrainedConfig) -> dict[str, tuple[Maths, float]]:
    """What the dense LM of a text configuration does to its head's logits: maths and number, by attribute."""
    found = {}
    for name, usual in HEAD_MATHS.items():
        maths = HEAD_EXCEPTIONS.get((name, config.model_type), usual)
        value = getattr(config, name, None)
        if maths is not None and value and not (maths in SCALES and value == 1):
            found[name] = maths, value
    return found


def apply_head_maths(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """What the dense LM of this text configuration does to `lm_head(hidden_states)`; most do nothing."""
    for maths, value in head_maths(config).values():
        logits = maths(logits, value)
    return logits


def find_head(model: Any) -> tuple[str, nn.Linear]:
    """The head of a dense causal LM, and its name.

    Args:
        model: the LM in its own class.

    Raises:
        ValueError: if it has no head, or one that is no Linear.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kind = "no head" if head is None else f"a {type(head).__name__} as its head"
        raise ValueError(
            f"{type(model).__name__} has {kind}; expected one Linear from hidden states to logits. Choose another LLM."
        )
    name = next(name for name, module in model.named_modules() if module is head)
    places = (f"{model.base_model_prefix}.", f"{name}.")
    between = [other for other, _ in model.named_parameters() if not other.startswith(places)]
    if between:
        raise ValueError(
            f"{type(model).__name__} computes its logits with {', '.join(between)} beside its base model and its head "
            f"{name}; expected one Linear from hidden states to logits. Choose another LLM."
        )
    return name, head
