"""`vlmoe demo`: what it shows and does. Nothing heavy is imported before it runs."""

from pathlib import Path
from typing import Annotated

import typer


def run_demo_command(
    output_dir: Annotated[Path, typer.Option(help="Folder of everything that the demo makes.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Seed of data, weights and batches.")] = 0,
    force: Annotated[bool, typer.Option(help="Empty an output folder that is not empty.")] = False,
) -> None:
    """Run the main job end to end on scenes it renders: dense parents, upcycling, tuning, evaluation, reloading.

    It pretrains a small LLM and a small ViT, upcycles them, aligns the connector, tunes with LoRA, and prints one
    table beside its controls: about 6 minutes on 2 cores, no download.
    """
    from .run import run_demo
    from .settings import DemoSettings

    run_demo(output_dir, DemoSettings(seed=seed), force, say=typer.echo)
