"""LoRA on experts that costs what the tokens need: PEFT's own adapter, without adding it to every expert's weights.

PEFT (0.21) wraps a stack of weights in a `ParamWrapper`, which at every pass adds `scaling * B A` to all of it, and
takes the gradient of all of it: a cost that grows with the experts, whatever the tokens (at 64 experts 3.9 times the
frozen model). Registering its parametrization computes that sum a first time, before any kernel could avoid it. So
the block looks through the wrappers before they run, and hands the kernel the pairs that they hold.

Nothing of PEFT is changed: modules, files, merging, unloading and switching are its own. The wrappers run themselves,
as ever, where something is not as expected: several active adapters, merged ones, packed or sharded weights, expert
parallelism, hooks on a wrapper, a compiler, wrappers of another make. Results are equal within rounding.

While the experts under an adapter are still copies of one another and not trained, their products are the same too:
then the base is computed once for all of them (see adapted_experts.py).

To switch it off: `with routed_lora(False): ...`, or `VLMOE_ROUTED_LORA=0` in the environment.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .expert_kernels import is_plain
from .expert_maths import ExpertMaths
from .shared_base import LowRank
from .stack_layout import cast_stack

SWITCH = "VLMOE_ROUTED_LORA"
WRAPPER = ("peft.tuners.lora.layer", "ParamWrapper")
# What is read of a wrapper; one that lacks any of it is of another make.
READ = (
    "active_adapters",
    "base_layer",
    "disable_adapters",
    "get_delta_factors",
    "lora_A",
    "lora_B",
    "merged",
    "num_experts",
    "parameter_name",
    "scaling",
    "_did_swap_in_out_features",
)

_is_on: ContextVar[bool | None] = ContextVar("routed_lora", default=None)


@contextmanager
def routed_lora(enabled: bool = True) -> Iterator[None]:
    """Within it adapters on experts run routed, or as PEFT runs them.

    Args:
        enabled: whether they are routed, where they can be.
    """
    token = _is_on.set(enabled)
    try:
        yield
    finally:
        _is_on.reset(token)


def is_enabled() -> bool:
    """Whether adapters are routed where they can be: as the context says, else the environment."""
    asked = _is_on.get()
    return os.environ.get(SWITCH, "1") not in ("0", "false", "no") if asked is None else asked


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT has put the module around a weight."""
    return (type(module).__module__, type(module).__name__) == WRAPPER


def unwrapped(experts: nn.Module) -> tuple[Any, list[Any]]:
    """The experts, and PEFT's wrappers around them, the outer one first."""
    wrappers = []
    while is_wrapper(experts):
        wrappers.append(experts)
        experts = experts.base_layer  # type: ignore[assignment]
    return experts, wrappers


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def active_adapter(wrapper: Any) -> str | None:
    """The one adapter that is at work in a wrapper; "" where none is.

    Returns:
        None where PEFT is to do it: several, merged, or a wrapper that is not as known.
    """
    if not all(hasattr(wrapper, name) for name in READ) or _has_hooks(wrapper):
        return None
    if wrapper.disable_adapters:
        return None if wrapper.merged else ""
    if wrapper.merged:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    return None if len(names) > 1 else (names or [""])[0]


def read_pairs(experts: Any, wrappers: list[Any]) -> dict[str, LowRank] | None:
    """The pairs that wrappers hold, by the name of the weight that they are added to; None where PEFT is to do it."""
    is_stack = isinstance(experts, ExpertMaths) and not hasattr(experts, "deltas")
    if not is_stack or not is_plain(experts):
        return None
    pairs: dict[str, LowRank] = {}
    for wrapper in wrappers:
        name = active_adapter(wrapper)
        if name is None or wrapper.parameter_name not in experts.stacks or wrapper.parameter_name in pairs:
            return None
        if not name:
            continue
        pair = _read_pair(wrapper, name, getattr(experts, wrapper.parameter_name))
        if pair is None:
            return None
        pairs[wrapper.parameter_name] = pair
    return pairs


def _read_pair(wrapper: Any, name: str, weight: Tensor) -> LowRank | None:
    """An adapter's pair as PEFT's `get_delta_factors` gives it (0.21), in the weight's dtype, but laid out while it is
    cast; None where it is not of the weight's shape.
    """
    num_experts = wrapper.num_experts
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight  # (E r, columns), (rows, r E)
    is_ours = wrapper._did_swap_in_out_features and num_experts == len(weight)  # ours are (E, rows, columns)
    if not is_ours or (len(b), a.shape[-1]) != tuple(weight.shape[1:]) or len(a) != b.shape[1] or len(a) % num_experts:
        return None
    stacks = a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).movedim(-1, 0)
    a, b = (cast_stack(one, weight.dtype) for one in stacks)
    return LowRank(a, b, wrapper.scaling[name])


def run_experts(experts: nn.Module, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Runs a block's experts, adapted or not.

    Args:
        experts: the experts, maybe inside PEFT's wrappers.
        x_TD: (T, D).
        expert_TK: the chosen experts, (T, K).
        weight_TK: their weights, (T, K).

    Returns:
        (T, O).

    Raises:
        ValueError: if PEFT is to run an adapter that has dropout, in training.
    """
    inner, wrappers = unwrapped(experts)
    if not wrappers:
        return experts(x_TD, expert_TK, weight_TK)
    pairs = read_pairs(inner, wrappers) if is_enabled() and not torch.compiler.is_compiling() else None
    if pairs:
        return inner(x_TD, expert_TK, weight_TK, pairs=pairs)  # called, so that its own hooks run
    if getattr(inner, "lora_dropout", 0.0) and inner.training and any(active_adapter(one) != "" for one in wrappers):
        raise ValueError(
            f"lora_dropout on experts is {inner.lora_dropout}, but here the adapter runs as PEFT runs it, which has "
            "no dropout on stacks of weights: routing is switched off, or several adapters are active, or the weights "
            "are packed, sharded or compiled. Train without these, or set the dropout to 0 (set_expert_dropout)."
        )
    return experts(x_TD, expert_TK, weight_TK)


def set_expert_dropout(model: nn.Module, probability: float) -> None:
    """Sets the dropout of LoRA on experts, which PEFT's configuration cannot hold for stacks of weights.

    It is applied where LoRA has it, to what each `A` reads: a token's for the first weight (the same for all experts
    it goes to), a path's for the second. It is no part of the saved adapter.

    Args:
        model: the model, or PEFT's around it.
        probability: from 0 to below 1.

    Raises:
        ValueError: for another probability, or where no experts are adapted.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"lora_dropout is {probability}; expected 0 or more, and less than 1.")
    found: list[Any] = [unwrapped(module)[0] for module in model.modules() if is_wrapper(module)]
    experts: list[Any] = [one for one in found if isinstance(one, ExpertMaths)]
    if probability and not experts:
        raise ValueError(
            "No experts of this model are adapted. Give it an adapter first, with target_parameters on experts."
        )
    for one in experts:
        one.lora_dropout = probability
