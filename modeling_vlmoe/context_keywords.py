"""How the router's context reaches sparse layers, and what they give comes back, whatever keywords their tower knows.

Most towers hand the keywords of their caller down to each layer, and record what modules give when a keyword asks for
it. Where a tower does not, the context is left on its layers for the pass, and hooks record.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils.output_capturing import capture_outputs

from .part_requests import CONTEXT
from .router_losses import RouterContext, RouterLosses
from .tower_images import context_of_tower

# What a tower gives beside its own outputs, and where it stands in what `RouterLosses` gives.
RECORDED = {"router_logits": 0, "router_losses": 2}


def check_runs_once(layer: Any, context: RouterContext) -> None:
    """Refuses what gradient checkpointing would lose when it runs a layer again: router losses, and what routers read.

    Raises:
        ValueError: naming the layer.
    """
    if layer.is_run_again and context.is_read:
        raise ValueError(
            f"{type(layer).__name__} is given no keywords by its tower, so that its router would not know what "
            "it reads beside the token when gradient checkpointing runs it again. Switch gradient checkpointing off."
        )
    if layer.is_run_again and any(context.coefficients):
        raise ValueError(
            f"{type(layer).__name__} is given no keywords by its tower, so that its router losses would be lost when "
            "gradient checkpointing runs it again. Switch gradient checkpointing off, or set the part's "
            "router_aux_loss_coef and router_z_loss_coef to 0."
        )


def takes_keywords(dense_class: Any) -> bool:
    """Whether a tower's forward takes keywords that it does not name."""
    parameters = inspect.signature(dense_class.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def is_recorded(dense_class: Any) -> bool:
    """Whether the host records what a tower's modules give, when it is asked to by a keyword."""
    function: Any = dense_class.forward
    while function is not None:
        if function.__code__.co_qualname.startswith(capture_outputs.__name__):  # `wraps` renames the function alone
            return True
        function = getattr(function, "__wrapped__", None)
    return False


@contextmanager
def left_on_layers(tower: nn.Module, context: RouterContext | None) -> Iterator[None]:
    """Within it the tower's sparse layers find the context on themselves."""
    layers: list[Any] = []
    if context is not None:
        layers = [layer for layer in tower.modules() if hasattr(layer, "sparse_attribute")]
    is_run_again = tower.training and any(getattr(one, "gradient_checkpointing", False) for one in tower.modules())
    learns = any(parameter.requires_grad for parameter in tower.parameters())
    if is_run_again and context is not None and not (context.is_read or (learns and any(context.coefficients))):
        layers = []  # nothing would be lost, and what runs again has to be what ran before
    for layer in layers:
        layer.left_context, layer.is_run_again = context, is_run_again
    try:
        yield
    finally:
        for layer in layers:
            layer.left_context = None


@contextmanager
def recorded(tower: nn.Module, names: list[str]) -> Iterator[dict[str, list[Any]]]:
    """Within it what is asked for is recorded, by the names of the tower's outputs, without the host's recorder."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    if not names:
        yield found
        return

    def record(module: nn.Module, args: tuple, output: tuple) -> None:
        for name in names:
            found[name].append(output[RECORDED[name]])

    layers = [layer for layer in tower.modules() if hasattr(layer, "sparse_attribute")]  # not a connector in a ViT
    modules = [module for layer in layers for module in layer.modules() if isinstance(module, RouterLosses)]
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def run_sparse_tower(tower: Any, dense_forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The dense class's forward with the router's keywords taken care of, whether or not it knows what to do with
    them, and whether its caller gives them or has left a request (`part_requests.PartRequest`).
    """
    if (request := tower.request) is None:
        outputs, found = _run(tower, dense_forward, *args, **kwargs)
        for name, values in found.items():
            outputs[name] = values
        return outputs
    wants_tuple = tower._is_recorded and kwargs.get("return_dict") is False
    if wants_tuple:
        del kwargs["return_dict"]
    outputs, found = _run(tower, dense_forward, *args, **(kwargs | request.keywords()))
    if tower._is_recorded:
        found = {name: outputs.get(name) for name in RECORDED}
    request.take(found.get("router_logits"), found.get("router_losses"))
    if not tower._is_recorded:
        return outputs
    # The host's class of outputs has no such fields: DDP, which takes outputs apart, could not put it together again.
    own = {name: value for name, value in outputs.items() if name not in RECORDED}
    return tuple(own.values()) if wants_tuple else type(outputs)(**own)


def _run(tower: Any, dense_forward: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, tuple[Any, ...]]]:
    """The tower's outputs, and what was recorded where the host's recorder does not do it."""
    context, names = context_of_tower(tower, kwargs.get(CONTEXT), args, kwargs), []
    if context is not None:
        kwargs[CONTEXT] = context
    if not tower._is_recorded:
        names = [name for name in RECORDED if kwargs.pop(f"output_{name}", False)]
    if not tower._takes_keywords:
        for name in (CONTEXT, *(f"output_{one}" for one in RECORDED)):
            kwargs.pop(name, None)
    if context is None and not names:
        return dense_forward(tower, *args, **kwargs), {}
    with left_on_layers(tower, context), recorded(tower, names) as found:
        outputs = dense_forward(tower, *args, **kwargs)
    return outputs, {
        name: tuple(values) for name, values in found.items() if all(value is not None for value in values)
    }
