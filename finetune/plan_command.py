"""`vlmoe plan MODEL [RECIPE] [KEY=VALUE]...`: what it shows and does. Nothing heavy is imported before it runs."""

import re
from typing import Annotated

import typer

from .gpus import GPUS, gpu_bytes, gpu_device
from .recipes import shipped_recipes

DEFAULT_RECIPE = "lora"


def read_size(text: str) -> tuple[int, int]:
    """A width and a height: "640x480", or "448" for both.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise ValueError(f"--image-size is {text!r}; expected pixels, as 448, or as 640x480.")
    return int(found[1]), int(found[2] or found[1])


def run_plan(
    model: Annotated[str, typer.Argument(help="A vlmoe model, or a dense VLM: a folder or a Hub id.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help=f"As for vlmoe finetune: {', '.join(shipped_recipes())} or a YAML file [default: {DEFAULT_RECIPE}], "
            "and settings that override the recipe's.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a batch; not given: the recipe's.", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a row, images' included; not given: max_length.", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Images of a row.")] = 1,
    image_size: Annotated[
        str, typer.Option(help="Their pixels: one number, or WIDTHxHEIGHT; matters where a ViT takes any.")
    ] = "640x480",
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"What it is to run on: GB, or a name: {', '.join(GPUS)} [default: what is here].", show_default=False
        ),
    ] = None,
) -> None:
    """Say what memory fine-tuning takes, before anything is loaded: by part, on which GPU it fits, and what would.

    The step is run on tensors without numbers; no weights are read. For example:
    vlmoe plan my-vlmoe lora --batch-size 4 --length 1024 --gpu "RTX 4090"
    """
    capacity, device = (None, None) if gpu is None else (gpu_bytes(gpu), gpu_device(gpu))
    size, given = read_size(image_size), list(words or ())
    recipe = given.pop(0) if given and "=" not in given[0] else DEFAULT_RECIPE

    from modeling_vlmoe import register

    from .planning import plan_recipe

    register()
    if batch_size is not None:
        given.append(f"per_device_train_batch_size={batch_size}")
    for line in plan_recipe(model, recipe, given, length, images, size, capacity, device):
        typer.echo(line)
