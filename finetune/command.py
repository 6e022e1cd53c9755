"""`vlmoe finetune RECIPE [KEY=VALUE]...`: what it shows and does. Nothing heavy is imported before it runs."""

from dataclasses import MISSING, Field, fields
from textwrap import wrap
from typing import Annotated, Any

import typer

from .control.settings import ControlSettings
from .recipes import shipped_chains, shipped_recipes
from .settings import FinetuneSettings

WIDTH = 78


def _describe(item: Field) -> str:
    """One setting, as help shows it."""
    default: Any = item.default_factory() if item.default_factory is not MISSING else item.default
    text = item.metadata["help"] + ("" if default in (None, "") else f" [default: {default}]")
    return "\n".join([f"  {item.name}", *wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")])


def settings_help() -> str:
    """All settings that are not transformers' own, one below the other; `\\b` keeps the lines."""
    settings = "\n".join(_describe(item) for item in (*fields(FinetuneSettings), *fields(ControlSettings)))
    return f"\b\nSettings, beside every field of transformers' TrainingArguments (learning_rate, ...):\n{settings}"


def run_finetune(
    recipe: Annotated[
        str,
        typer.Argument(
            help=f"A YAML file of settings, or a shipped recipe: {', '.join(shipped_recipes())}; of several stages: "
            f"{', '.join(shipped_chains())}."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings that override the recipe's; STAGE.KEY=VALUE those of one stage."
        ),
    ] = None,
    with_dense_control: Annotated[
        bool, typer.Option("--with-dense-control", help="Train the dense model too, and say the difference.")
    ] = False,
) -> None:
    """Tune a vlmoe model on chat-format image-text data: its connector, LoRA, or all; in one stage or in several.

    For example: vlmoe finetune lora model=my-vlmoe data=questions.jsonl output_dir=tuned learning_rate=1e-4

    A recipe of several stages goes on where it was interrupted, by the same command.
    """
    from modeling_vlmoe import register

    from .chain.processes import is_main
    from .recipe_runs import run_recipe

    register()
    flags = {"with_dense_control": True} if with_dense_control else {}
    done = run_recipe(recipe, overrides or (), flags, say=typer.echo)
    if is_main():
        typer.echo(done)
