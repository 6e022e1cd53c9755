"""What a run with a dense control can be told, beside its recipe. No torch here: help reads these fields."""

from dataclasses import dataclass, field, fields
from typing import Any

from ..evaluate.settings import TASK_NAMES
from ..settings import nearest, option

CONTROL_NAME = "control.json"
TOKENS, FLOPS = "tokens", "flops"
MATCHES: tuple[str, ...] = (TOKENS, FLOPS)
NO_TASK = "none"
# What a switch may be, where YAML has read it.
SWITCHES = (True, False)


@dataclass(frozen=True)
class ControlSettings:
    """The fields of a recipe that are about its control.

    Raises:
        ValueError: for values that cannot work.
    """

    with_dense_control: bool = option(
        False,
        "Whether the dense model is trained too, on the same tokens in the same order, and the difference is printed "
        "and put into the card; also --with-dense-control.",
    )
    dense_model: str | None = option(
        None,
        "The dense model to begin with, where the model's receipt does not lead to it: one of `vlmoe upcycle "
        "--dense`, tuned as far as the sparse one was.",
    )
    control_match: str = option(
        TOKENS, "tokens: the control takes as many steps; flops: as many more as make its training cost the same."
    )
    control_seeds: list[int] | int = field(
        default=1,
        metadata={"help": "Over how many seeds both are trained, from `seed` on; or which seeds, as a list."},
    )
    control_task: str = option(
        "vqa",
        f"How answers to `eval_data` are judged, beside their negative log-likelihood: {', '.join(TASK_NAMES)}, as by "
        f"`vlmoe evaluate`; or {NO_TASK}.",
    )

    def __post_init__(self) -> None:
        if self.with_dense_control not in SWITCHES:
            raise ValueError(f"with_dense_control is {self.with_dense_control!r}; expected true or false.")
        for name, known in (("control_match", MATCHES), ("control_task", (*TASK_NAMES, NO_TASK))):
            if (word := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {word!r}; expected one of {', '.join(known)}.{nearest([word], known)}")
        given = self.control_seeds
        seeds = given if isinstance(given, list) else [given]
        if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError(f"control_seeds is {given!r}; expected how many, or a list of different seeds.")
        if given == 0:
            raise ValueError("control_seeds is 0; expected 1 or more, or a list of seeds.")

    def seeds(self, first: int) -> list[int]:
        """The seeds that both are trained with.

        Args:
            first: the recipe's own.
        """
        given = self.control_seeds
        return list(given) if isinstance(given, list) else list(range(first, first + given))


CONTROL_KEYS: tuple[str, ...] = tuple(item.name for item in fields(ControlSettings))


def split_control(values: dict[str, Any]) -> tuple[ControlSettings, dict[str, Any]]:
    """What of a recipe is about its control, and the rest of it.

    Raises:
        ValueError: for values that cannot work, and for those that say nothing without a control.
    """
    given = {name: value for name, value in values.items() if name in CONTROL_KEYS and value is not None}
    settings = ControlSettings(**given)
    if (idle := [name for name in given if name != "with_dense_control"]) and not settings.with_dense_control:
        raise ValueError(
            f"{', '.join(idle)} is given, but no control is trained; add --with-dense-control, or leave it out."
        )
    return settings, {name: value for name, value in values.items() if name not in CONTROL_KEYS}
