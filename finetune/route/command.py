"""`vlmoe route CHECKPOINT DATA...`: what it shows and does. Nothing heavy is imported before it runs."""

from typing import Annotated

import typer

from ..data_formats.names import AUTO, FORMAT_NAMES
from .settings import NUMBERS, PAGE, RouteSettings


def run_route(
    checkpoint: Annotated[str, typer.Argument(help="A vlmoe model or an adapter: a folder, or a model's Hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="Data as vlmoe finetune reads it: JSONL files, folders, Hub ids; several are told apart.",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of the page, the figures and the numbers.")] = "routing",
    split: Annotated[str, typer.Option(help="The split of data that is no single file.")] = "test",
    data_format: Annotated[
        str, typer.Option("--format", help=f"The form of the rows: {', '.join(FORMAT_NAMES)}.")
    ] = AUTO,
    image_folder: Annotated[
        str | None,
        typer.Option(
            help="The folder that paths of images are counted from [default: the data file's].", show_default=False
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What captioned and labelled images are asked.", show_default=False)
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="The layer shown first: 17 (of the LLM), vision/3, connector [default: the last of the ViT].",
            show_default=False,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Rows of each data that are measured, evenly spaced.")] = 200,
    num_shown: Annotated[int, typer.Option(help="Of these, rows shown with their patches and tokens.")] = 6,
    label_field: Annotated[
        str | None,
        typer.Option(help="The field of the rows that labels them [default: the answer].", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a pass; a VLM sparse in place takes one at a time.")] = 8,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model carries.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier result in the folder.")] = False,
) -> None:
    """Show where a model sends its tokens: one page with loads, co-activation, specialisation, patches and tokens.

    The model reads samples with their answers; nothing is generated. For example:
    vlmoe route tuned/merged data/test.jsonl --label-field kind --output-dir routing
    """
    settings = RouteSettings(
        checkpoint,
        data or [],
        output_dir=output_dir,
        split=split,
        data_format=data_format,
        image_folder=image_folder,
        question=question,
        layer=layer,
        num_samples=num_samples,
        num_shown=num_shown,
        label_field=label_field,
        batch_size=batch_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
        force=force,
    )

    from modeling_vlmoe import register

    from .route import route

    register()
    folder = route(settings)
    typer.echo(f"{folder / PAGE}: open it in a browser; the numbers are in {NUMBERS}")
