"""What may be said of a part's router."""

from typing import Any

from .modality_routing import check_modality_routing

DEFAULT_TEXT_SIZE = 64
FEWEST_NORMALIZED = 3
EXPERT_CHOICE = "expert_choice"


def _check_positive(part: str, moe: dict[str, Any], name: str) -> None:
    values = moe[name] if isinstance(moe[name], list) else [moe[name]]
    if any(value is not None and not 0 < value < float("inf") for value in values):
        raise ValueError(f"{part}_moe.{name} is {moe[name]}; expected more than 0.")


def _check_text_gate(part: str, moe: dict[str, Any]) -> None:
    """Checks the fields of a text gate, and fills in its width."""
    given = moe["router_text_size"]
    if moe["router_type"] != "attention":
        if given is not None:
            raise ValueError(
                f"{part}_moe.router_text_size is {given}, but router_type is {moe['router_type']!r}, which reads no "
                'text; leave it out, or set router_type to "attention".'
            )
        return
    if part == "text":
        raise ValueError(
            'text_moe.router_type is "attention", but that router sends the tokens of an image by the text around it, '
            "and the LLM's own tokens are text, of which a later one may not route an earlier one. Choose it for "
            "vision_moe or connector_moe."
        )
    moe["router_text_size"] = DEFAULT_TEXT_SIZE if given is None else given
    if moe["router_text_size"] < 1:
        raise ValueError(f"{part}_moe.router_text_size is {given}; expected 1 or more.")


def _check_expert_choice(part: str, moe: dict[str, Any]) -> None:
    if moe["router_type"] != EXPERT_CHOICE:
        return
    if part == "text":
        raise ValueError(
            f"text_moe.router_type is {EXPERT_CHOICE!r}, but there a later token can take an earlier one's place, "
            'which is not causal. Choose "softmax" or "sigmoid" for the LLM; it is for vision_moe and connector_moe.'
        )
    if moe["use_expert_bias"]:
        raise ValueError(
            f"{part}_moe.use_expert_bias is set, but with router_type {EXPERT_CHOICE!r} experts get the same load "
            "without it; leave it out."
        )


def _check_logit_norm(part: str, moe: dict[str, Any]) -> None:
    """Two numbers of mean 0 and a fixed spread are always the same two: such a router could not learn."""
    if moe["router_logit_norm"] is None:
        return
    numbers = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]]
    if (pools := moe["modality_experts"]) is not None:
        numbers = [pools[0] + pools[2], pools[1] + pools[2]]
    if min(numbers) < FEWEST_NORMALIZED:
        raise ValueError(
            f"{part}_moe.router_logit_norm is {moe['router_logit_norm']}, but some tokens have {min(numbers)} experts "
            f"to choose from; of fewer than {FEWEST_NORMALIZED} the normalised logits never change, so that the "
            "router cannot learn. Leave it out, or give more experts."
        )


def check_routing(part: str, moe: dict[str, Any]) -> None:
    """Checks the router's fields, and fills in what follows from others.

    Args:
        part: "text", "vision" or "connector".
        moe: all fields of its `MoEConfig`.

    Raises:
        ValueError: naming the field.
    """
    for name in ("routed_scaling_factor", "router_logit_norm", "expert_bias_update_rate"):
        _check_positive(part, moe, name)
    check_modality_routing(part, moe)
    _check_logit_norm(part, moe)
    _check_text_gate(part, moe)
    _check_expert_choice(part, moe)


def check_per_layer(part: str, moe: dict[str, Any]) -> None:
    """Refuses lists that have not one entry for each sparse layer.

    Raises:
        ValueError: naming the field.
    """
    wanted = 1 if moe["layers"] is None else len(moe["layers"])
    for name in ("num_experts", "routed_scaling_factor"):
        if isinstance(given := moe[name], list) and len(given) != wanted:
            raise ValueError(
                f"{part}_moe.{name} is {given}, {len(given)} numbers, but the {part} part has {wanted} sparse layers. "
                "Give one number for each, or one for all."
            )
