"""`vlmoe finetune RECIPE [KEY=VALUE]...`: what it shows and does. Nothing heavy is imported before it runs."""

from dataclasses import MISSING, Field, fields
from textwrap import wrap
from typing import Annotated, Any

import typer

from .recipes import shipped_recipes
from .settings import SETTINGS_NAME, FinetuneSettings

WIDTH = 78


def _describe(item: Field) -> str:
    """One setting, as help shows it."""
    default: Any = item.default_factory() if item.default_factory is not MISSING else item.default
    text = item.metadata["help"] + ("" if default in (None, "") else f" [default: {default}]")
    return "\n".join([f"  {item.name}", *wrap(text, WIDTH, initial_indent="      ", subsequent_indent="      ")])


def settings_help() -> str:
    """All settings that are not transformers' own, one below the other; `\\b` keeps the lines."""
    settings = "\n".join(_describe(item) for item in fields(FinetuneSettings))
    return f"\b\nSettings, beside every field of transformers' TrainingArguments (learning_rate, ...):\n{settings}"


def run_finetune(
    recipe: Annotated[
        str, typer.Argument(help=f"A YAML file of settings, or a shipped recipe: {', '.join(shipped_recipes())}.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that override the recipe's.")
    ] = None,
) -> None:
    """Tune a vlmoe model on chat-format image-text data: its connector, or LoRA on attention and experts.

    For example: vlmoe finetune lora model=my-vlmoe data=questions.jsonl output_dir=tuned learning_rate=1e-4
    """
    from modeling_vlmoe import register

    from .arguments import parse_recipe
    from .train import finetune

    register()
    folder = finetune(parse_recipe(recipe, overrides or ()), say=typer.echo)
    typer.echo(f"{folder}: done; settings in {SETTINGS_NAME}")
