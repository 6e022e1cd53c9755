"""What settings say of what is trained and how fast, checked before anything is loaded."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ..settings import FinetuneSettings, nearest
from .names import CONNECTOR, NAMES, PARTS, PRESETS, VISION, cells_of, is_pattern, tower_of

GROUPED: tuple[str, ...] = ("learning_rates", "weight_decays", "warmups")
BITS: tuple[int, ...] = (4, 8)
# The methods that `train` says something to.
TAKES_TRAIN: tuple[str, ...] = ("full", "lora")
# What patterns begin with that match nothing of the LLM, as our composite names its parts.
OF_IMAGES = ("model.vision_tower.", "model.connector.")


def check_train(settings: FinetuneSettings) -> None:
    """Refuses words that are neither names nor patterns, and `train` where the method says what is trained.

    Raises:
        ValueError: saying which are known.
    """
    given: Any = settings.train or []
    if isinstance(given, str) or not all(isinstance(word, str) for word in given):
        raise ValueError(f"train is {given!r}; expected names of parts or patterns, as a list.")
    if given and settings.method not in TAKES_TRAIN:
        raise ValueError(
            f"train is {given}, but method {settings.method} says itself what is trained; leave train out, or choose "
            f"method full."
        )
    if unknown := [word for word in given if word not in NAMES and not is_pattern(word)]:
        raise ValueError(
            f"train has {', '.join(map(repr, unknown))}; expected names of parts ({', '.join(PARTS)}), of several "
            f"({', '.join(PRESETS)}), or patterns on names of parameters, with a dot or a *.{nearest(unknown, NAMES)}"
        )


def learns_from_images_alone(settings: FinetuneSettings) -> bool:
    """Whether nothing is trained that text alone reaches: a batch without images would have nothing to learn from."""
    if settings.method == "align":
        return True
    if settings.method != "full" or not settings.train:
        return False
    by_name = [cell for word in settings.train if not is_pattern(word) for cell in cells_of(word)]
    patterns = [word for word in settings.train if is_pattern(word)]
    return all(tower_of(cell) in (VISION, CONNECTOR) for cell in by_name) and all(
        pattern.startswith(OF_IMAGES) for pattern in patterns
    )


def read_group(name: str, given: Any) -> dict[str, float]:
    """A setting that says a number for each of some parts.

    Args:
        name: the setting's.
        given: a mapping, or one as JSON; None is an empty one.

    Raises:
        ValueError: for unknown parts, and for what is no number of 0 or more.
    """
    if isinstance(given, str):
        with suppress(json.JSONDecodeError):
            given = json.loads(given)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {given!r}; expected parts and a number for each: {{routers: 0.001}}.")
    if unknown := [part for part in given if part not in PARTS]:
        said = "; a preset may overlap others" if set(unknown) <= set(PRESETS) else nearest(unknown, PARTS)
        raise ValueError(f"{name} names {', '.join(map(repr, unknown))}; expected some of {', '.join(PARTS)}{said}")
    return {part: _number(f"{name}.{part}", value) for part, value in given.items()}


def _number(name: str, value: Any) -> float:
    """A number as YAML gives it: of `1e-4` it makes a text."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value!r}; expected a number of 0 or more.")
    return number


def check_warmups(warmups: Iterable[float]) -> None:
    """Refuses a warm-up that is neither whole steps nor a share.

    Raises:
        ValueError: naming it.
    """
    for value in warmups:
        if value >= 1 and value != int(value):
            raise ValueError(f"warmups has {value}; expected whole steps, or a share of all steps below 1.")


def check_bits(settings: FinetuneSettings) -> None:
    """Refuses packed weights where they would be trained, or where LoRA on them could not do what is asked.

    Raises:
        ValueError: saying what to choose.
    """
    bits = settings.quantize_bits
    if bits is None:
        return
    if bits not in BITS:
        raise ValueError(f"quantize_bits is {bits}; expected one of {', '.join(map(str, BITS))}, or leave it out.")
    if settings.method != "lora":
        raise ValueError(
            f"quantize_bits is {bits}, but method {settings.method} leaves a full checkpoint, and packed weights are "
            "neither trained nor saved. Choose method lora, or leave quantize_bits out."
        )
    if settings.fsdp_size or settings.ep_size:
        raise ValueError(
            f"quantize_bits is {bits}, but packed weights are not split over processes. Leave fsdp_size and ep_size "
            "out, or quantize_bits."
        )
    if settings.lora_dropout and "experts" in settings.lora_targets:
        raise ValueError(
            f"quantize_bits is {bits} and lora_dropout {settings.lora_dropout}, but LoRA on packed experts has no "
            "dropout. Leave one of them out, or experts out of lora_targets."
        )


def check_trained(settings: FinetuneSettings) -> None:
    """All of these checks; makes mappings of numbers of `GROUPED`.

    Raises:
        ValueError: naming the setting.
    """
    check_train(settings)
    for name in GROUPED:
        setattr(settings, name, read_group(name, getattr(settings, name)) or None)
    check_warmups((settings.warmups or {}).values())  # type: ignore[union-attr]
    check_bits(settings)
