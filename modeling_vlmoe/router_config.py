"""What may be said of a part's router."""

from typing import Any

from .modality_routing import check_modality_routing


def _check_positive(part: str, moe: dict[str, Any], name: str) -> None:
    values = moe[name] if isinstance(moe[name], list) else [moe[name]]
    if any(value is not None and not 0 < value < float("inf") for value in values):
        raise ValueError(f"{part}_moe.{name} is {moe[name]}; expected more than 0.")


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
