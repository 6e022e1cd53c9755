"""Settings that the method does not hear are refused where the user gave them, and not where they come along.

A recipe tuned by another method than its own, `vlmoe finetune lora ... method=align`, brings its other settings along:
they are no mistake. One given on the command line, or beside the method that does not hear it, is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from .settings import METHODS, FinetuneSettings, is_heard


def _defaults() -> dict[str, Any]:
    made = {
        item.name: item.default_factory for item in fields(FinetuneSettings) if item.default_factory is not MISSING
    }
    plain = {item.name: item.default for item in fields(FinetuneSettings) if item.default is not MISSING}
    return plain | {name: make() for name, make in made.items()}


def says_something(name: str, value: Any) -> bool:
    """Whether a value is another than the setting's default; None stands for that."""
    default = _defaults().get(name)
    if isinstance(default, list) and isinstance(value, str):
        value = [word.strip() for word in value.split(",")]
    return value is not None and value != default


def method_of(values: Mapping[str, Any]) -> str:
    """The method that some settings say, or the default one."""
    return str(values.get("method") or METHODS[0])


def methods_that_hear(name: str) -> list[str]:
    """The methods that a setting says something to."""
    return [method for method in METHODS if is_heard(name, method)]


def unheard(values: Mapping[str, Any], methods: Iterable[str]) -> list[str]:
    """The settings that say something, though to none of these methods."""
    methods = list(methods)
    if not set(methods) <= set(METHODS):
        return []  # the method itself is wrong
    return [
        name
        for name, value in values.items()
        if not any(is_heard(name, method) for method in methods) and says_something(name, value)
    ]


def check_heard(recipe: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
    """Refuses settings that the method does not hear.

    Args:
        recipe: what the recipe says.
        given: what comes before it.
        where: what is said of both.

    Raises:
        ValueError: naming the settings, and the method that hears them.
    """
    method = method_of({**recipe, **{name: value for name, value in given.items() if value is not None}})
    brought = {name: value for name, value in recipe.items() if name not in given}
    idle = [*unheard(given, [method]), *unheard(unheard_values(brought, method), [method_of(recipe)])]
    if idle:
        raise ValueError(
            f"{where} gives {', '.join(idle)}, which method {method} does not hear; leave it out, or choose method "
            f"{' or '.join(methods_that_hear(idle[0]))}."
        )


def unheard_values(values: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Of some settings those that a method does not hear."""
    return {name: values[name] for name in unheard(values, [method])}
