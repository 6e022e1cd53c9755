"""One forward pass of a host's VLM that is sparse in place: the host's own, around which its parts are asked."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .context_keywords import RECORDED
from .host_images import context_of_host_images, for_host
from .moe_config import PARTS, part_config
from .part_requests import PartRequest
from .parts import connector_blocks
from .router_losses import RouterContext, follow_loss
from .routing import micro_batch_share

# What outputs call the router logits of each part.
LOGITS = {"text": "router_logits", "vision": "vision_router_logits", "connector": "connector_router_logits"}
# What the names of the LLM's inputs begin with: without an encoder, and with one, whose inputs are called so then.
LLM_PREFIXES = ("", "decoder_")
# What the names of images and videos, of what is encoded of them too, begin with.
IMAGES = ("pixel_values", "mm_encoder_outputs", "image_hidden_states")
_ROUTED_OUTPUTS: dict[type, Any] = {}


@torch.compiler.assume_constant_result  # dynamo makes no classes; which one it is follows from the class alone
def routed_output_class(dense_class: Any) -> Any:
    """The host's class of outputs with those of the routers; one per class."""
    if dense_class not in _ROUTED_OUTPUTS:
        names = [*LOGITS.values(), "router_losses", "aux_loss"]
        members = {
            "__module__": __name__,
            "__annotations__": {name: Any for name in names if not hasattr(dense_class, name)},
            **{name: field(default=None) for name in names if not hasattr(dense_class, name)},
        }
        made: Any = dataclass(type(f"Routed{dense_class.__name__}", (dense_class,), members))
        _ROUTED_OUTPUTS[dense_class] = made
    return _ROUTED_OUTPUTS[dense_class]


def sparse_modules(body: Any) -> dict[str, list[Any]]:
    """What is asked of each sparse part: the tower; of the connector, its experts (PEFT may hold a copy of them)."""
    found: dict[str, list[Any]] = {}
    for part in PARTS:
        if body.config.moe(part) is not None:
            is_tower = part in body.tower_paths
            found[part] = [body.get_submodule(body.tower_paths[part])] if is_tower else connector_blocks(body)
    return found


@contextmanager
def asked(body: Any, context: RouterContext | None, wants_logits: bool) -> Iterator[dict[str, PartRequest]]:
    """Within it the sparse parts of a model find a request each, and answer it."""
    modules = sparse_modules(body)
    requests = {part: PartRequest(context and context.of(part), wants_logits) for part in modules}
    body.is_asked = True
    for part, holders in modules.items():
        for holder in holders:
            holder.request = requests[part]
    try:
        yield requests
    finally:
        body.is_asked = False
        for holders in modules.values():
            for holder in holders:
                holder.request = None


def add_routing(body: Any, outputs: Any, requests: dict[str, PartRequest], wants_logits: bool) -> Any:
    """The host's outputs with the parts' answers."""
    fields: dict[str, Any] = {}
    if wants_logits:
        fields = {LOGITS[part]: tuple(request.router_logits) for part, request in requests.items()}
        fields = {name: value or None for name, value in fields.items()}
    found = {part: request.router_losses for part, request in requests.items()}
    fields["router_losses"], fields["aux_loss"] = body.weigh_losses(found, body.device)
    # A body may give its LLM's outputs as they are, with what was recorded there.
    given = {name: value for name, value in outputs.items() if name not in RECORDED}
    return routed_output_class(type(outputs))(**(given | fields))


def wants_router_logits(body: Any, given: bool | None) -> bool:
    """Whether router logits are asked for: by the caller, else by the configuration."""
    if given is not None:
        return bool(given)
    return bool(getattr(part_config(body.config, "text"), "output_router_logits", False))


def wants_tuple(model: Any, given: bool | None) -> bool:
    """Whether outputs are asked for as a tuple: by the caller, else by the configuration, as the host does it."""
    return not (getattr(model.config, "return_dict", True) if given is None else given)


def run_routed(model: Any, dense_forward: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The host's forward, around which the sparse parts are asked.

    The outermost model opens the pass: the one with the head, or where a trainer calls the body alone (TRL), that.

    Args:
        model: a model with or without a head.
        dense_forward: the host's forward.
        given: its arguments by name, and `output_router_logits`.

    Returns:
        The host's outputs, with `router_logits`, `vision_router_logits`, `connector_router_logits` where they are
        asked for, and in training `router_losses` and `aux_loss` (see `VLMoEModelOutputWithPast`); as a tuple where
        that is asked for.
    """
    body = model.base_model
    if body.is_asked:
        return dense_forward(model, **given)
    wants_logits = wants_router_logits(body, given.pop("output_router_logits", None))
    labels: Tensor | None = given.get("labels")
    share = micro_batch_share(labels, given.get("num_items_in_batch"))
    prefix = LLM_PREFIXES[bool(body.config.is_encoder_decoder)]
    mask = given.get(f"{prefix}attention_mask")
    ids, embeds = (given.get(f"{prefix}{name}") for name in ("input_ids", "inputs_embeds"))
    has_images = any(value is not None for name, value in given.items() if name.startswith(IMAGES))
    context = body.router_context(
        mask, share, labels is not None, ids, embeds, given.get("mm_token_type_ids"), has_images
    )
    context = context_of_host_images(body, context, given, mask, ids, embeds)
    given = for_host(model, given)
    if context is None and not wants_logits:
        return dense_forward(model, **given)
    is_tuple = wants_tuple(model, given.get("return_dict"))
    if is_tuple:  # a tuple does not say where the loss is
        given["return_dict"] = True
    with asked(body, context, wants_logits) as requests:
        found = dense_forward(model, **given)
    if not isinstance(found, ModelOutput):
        raise TypeError(f"{type(model).__name__} gave a {type(found).__name__} where a ModelOutput was asked for.")
    outputs: Any = add_routing(body, found, requests, wants_logits)
    if labels is not None and outputs.get("loss") is not None:
        outputs["loss"] = follow_loss(outputs["loss"], context)
    return outputs.to_tuple() if is_tuple else outputs
