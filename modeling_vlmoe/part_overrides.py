"""What `from_pretrained` may be told of the parts: whatever leaves the stored weights their shapes and places.

Top-k, loss coefficients and the like may be overridden. What the experts are cannot: the host would fill the gaps with
random weights (transformers 5.23 reports them, and goes on).
"""

import os
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file

from .companions import hub_keywords
from .configuration_vlmoe import VLMoEConfig
from .moe_config import PARTS
from .parts_config import MODEL_TYPE

# The fields of a part that the shapes and the places of its weights follow from.
SHAPING = (
    "num_experts",
    "layers",
    "moe_intermediate_size",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "router_type",
    "router_text_size",
    "use_expert_bias",
    "modality_routing",
    "modality_experts",
    "expert_type",
    "expert_rank",
)
OTHERWISE = "`vlmoe upcycle` makes other experts of a dense model."
# What makes another checkpoint of a stored one, by the field that it changes.
CONVERTED = dict.fromkeys(
    ("modality_routing", "modality_experts"), "`vlmoe convert-routing` writes one that is routed otherwise."
)


def stored_values(name: Any, config: Any, **kwargs: Any) -> dict[str, Any] | None:
    """The JSON values of the configuration that lies beside the weights; None where there is none of ours.

    Args:
        name: as `from_pretrained` takes it.
        config: what is to be built; it may know the commit it came from.
        **kwargs: as `from_pretrained` takes them; those that say where files are, are used.
    """
    where = hub_keywords(kwargs) | {"_commit_hash": getattr(config, "_commit_hash", None)}
    quiet = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_missing_entries": False}
    if cached_file(os.fspath(name), CONFIG_NAME, **where, **quiet) is None:
        return None  # the host says what is missing
    values, _ = PreTrainedConfig.get_config_dict(name, **where)
    return values if values.get("model_type") == MODEL_TYPE else None


def asked_config(values: dict[str, Any], config: Any, kwargs: dict[str, Any]) -> Any:
    """The configuration that a model is to be built from: the one that is given, else the stored one with what the
    keywords change of the parts.
    """
    if config is not None:
        return config
    names = [f"{part}_moe" for part in PARTS] + [name for name, value in values.items() if isinstance(value, dict)]
    return VLMoEConfig.from_dict(values, **{name: kwargs[name] for name in names if name in kwargs})


def describe(part: str, moe: Any) -> str:
    """What the weights of a part are."""
    if moe is None:
        return f"the {part} part is dense"
    where = "" if moe.layers is None else f" in layers {moe.layers}"
    return f"the {part} part has {moe.num_experts} experts{where}"


def check_part(part: str, asked: Any, stored: Any, name: Any) -> None:
    """Refuses settings of a part that its stored weights do not fit.

    Raises:
        ValueError: naming the field.
    """
    if (asked is None) != (stored is None):
        given = "None" if asked is None else "given"
        raise ValueError(f"{part}_moe is {given}, but in {name} {describe(part, stored)}. Leave it out; {OTHERWISE}")
    if asked is None:
        return
    for field in SHAPING:
        given, found = getattr(asked, field), getattr(stored, field)
        # None stands for what is resolved when the model is built.
        if given is not None and found is not None and given != found:
            raise ValueError(
                f"{part}_moe.{field} is {given!r}, but in {name} it is {found!r} ({describe(part, stored)}). "
                f"Leave it out: weights are loaded as they were made. {CONVERTED.get(field, OTHERWISE)}"
            )


def check_overrides(name: Any, **kwargs: Any) -> None:
    """Refuses to load weights into a model that they do not fit.

    Args:
        name: a folder or a Hub id, as `from_pretrained` takes it.
        **kwargs: as `from_pretrained` takes them.

    Raises:
        ValueError: naming the part and the field.
    """
    config = kwargs.pop("config", None)
    if config is not None and not hasattr(config, "moe"):
        return  # a path or an identifier: the configuration of another model, which the host compares
    if (values := stored_values(name, config, **kwargs)) is None:
        return
    asked, stored = asked_config(values, config, kwargs), VLMoEConfig.from_dict(values)
    for part in PARTS:
        check_part(part, asked.moe(part), stored.moe(part), name)
