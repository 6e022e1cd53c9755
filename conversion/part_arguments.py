"""What `vlmoe upcycle` can be told of one part's experts beyond their number: any field of its `MoEConfig`.

>>> read_fields("router_logit_norm: 1, router_z_loss_coef: 0", "text_moe")
{'router_logit_norm': 1, 'router_z_loss_coef': 0}

No torch here: help reads the settings that this checks.
"""

from collections.abc import Iterable
from typing import Any

# Fields that have a flag of their own, and which.
FLAGS = {
    "num_experts": "--{part}-experts",
    "num_experts_per_tok": "--{part}-top-k",
    "layers": "--{part}-layers",
    "router_type": "--{part}-router",
    "expert_type": "--expert-init",
    "expert_rank": "--expert-rank",
}
# Fields of experts that are not made of a dense MLP alone.
NOT_MADE = ("moe_intermediate_size", "num_shared_experts", "shared_expert_intermediate_size")


def read_fields(given: dict[str, Any] | str | None, name: str) -> dict[str, Any]:
    """Fields of a `MoEConfig`, as a recipe's mapping or as a flag's text, whose braces may be left out.

    Raises:
        ValueError: naming the setting, when it is no such mapping, names a field that has a flag, or one that
            upcycling cannot fill.
    """
    values = given
    if isinstance(given, str):
        import yaml

        text = given.strip()
        try:
            values = yaml.safe_load(text if text.startswith("{") else f"{{{text}}}")
        except yaml.YAMLError as error:
            raise ValueError(
                f"{name} is {given!r}, which cannot be read: {error}. Write `field: value, field: value`."
            ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or any(value is None for value in values.values()):
        raise ValueError(
            f"{name} is {given!r}; expected fields of a MoEConfig and their values. Write `field: value, field: "
            "value`."
        )
    part = name.removesuffix("_moe")
    for field in values:
        if field in FLAGS:
            raise ValueError(
                f"{name} names {field}, which has an option of its own; give {FLAGS[field]}.".format(part=part)
            )
        if field in NOT_MADE:
            raise ValueError(
                f"{name} names {field}, but each expert is made of the whole dense MLP and of nothing else; leave it "
                "out."
            )
    return dict(values)


def read_counts(given: int | str | Iterable[int] | None, name: str) -> int | list[int] | None:
    """A number of experts, or one for each sparse layer: `4`, `2,4,8`, or a list.

    Raises:
        ValueError: naming the option, when it is none of these.
    """
    if given is None or isinstance(given, int):
        return given
    words = given.split(",") if isinstance(given, str) else [str(one) for one in given]
    if not words or not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"{name} is {given!r}; expected one number, or one for each sparse layer like 4,8,8.")
    numbers = [int(word) for word in words]
    return numbers[0] if len(numbers) == 1 and isinstance(given, str) else numbers
