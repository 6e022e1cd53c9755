"""`vlmoe data check DATA...`: what it shows and does. Nothing heavy is imported before it runs."""

from typing import Annotated, Any

import typer

from ..data_formats.names import AUTO, FORMAT_NAMES
from .settings import DataCheckSettings

FAULTY = 2  # the exit code where there are faults: the user can mend them

data_app = typer.Typer(
    help="Look at data before a model is trained on it.", no_args_is_help=True, rich_markup_mode=None
)


@data_app.callback()
def data_group() -> None:
    """Keeps `check` a sub-command, while it is the only one."""


def option(text: str, *names: str, **kwargs: Any) -> Any:
    """An option whose default needs no telling."""
    return typer.Option(*names, help=text, show_default=False, **kwargs)


@data_app.command("check")
def run_data_check(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            help="Data as vlmoe finetune reads it: files (.jsonl, .json, .parquet, .tar), folders, Hub ids.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, option("A model or an adapter: rows are also laid out and counted by its processor.")
    ] = None,
    data_format: Annotated[
        str, typer.Option("--format", help=f"The form of the rows: {', '.join(FORMAT_NAMES)}.")
    ] = AUTO,
    image_folder: Annotated[
        str | None, option("The folder that paths of images are counted from [default: the data file's].")
    ] = None,
    question: Annotated[str | None, option("What captioned and labelled images are asked.")] = None,
    split: Annotated[str, typer.Option(help="The split of data that is no single file.")] = "train",
    max_length: Annotated[
        int | None, option("With --model: the longest sample in tokens [default: the model's positions].")
    ] = None,
    max_rows: Annotated[int | None, option("At most so many rows of each data, from the first on.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    revision: Annotated[str | None, option("Branch, tag or commit of the model on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model carries.")
    ] = False,
) -> None:
    """Go over all rows and images, and say in words and counts what is wrong; exit code 2 if anything is.

    Nothing is changed, and no row left out. For example: vlmoe data check questions.jsonl --model my-vlmoe
    """
    settings = DataCheckSettings(
        data or [],
        model,
        split=split,
        data_format=data_format,
        image_folder=image_folder,
        question=question,
        max_length=max_length,
        max_rows=max_rows,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )

    from json import dumps

    from modeling_vlmoe import register

    from .check import check_data

    register()
    tallies = check_data(settings)
    num_faults = sum(tally.num_faults for tally in tallies)
    if json:
        report = {"data": [tally.as_dict() for tally in tallies], "faults": num_faults}
        typer.echo(dumps(report, indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(line for tally in tallies for line in tally.lines()))
    if num_faults:
        raise typer.Exit(FAULTY)
