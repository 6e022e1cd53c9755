"""`vlmoe backbones`: which families of transformers can be upcycled, as measured, or measured anew."""

from typing import Annotated, Any

import typer

from modeling_vlmoe.conversion.backbones.table import (
    check_known,
    describe,
    read_table,
    render_list,
    render_page,
    write_table,
)
from modeling_vlmoe.logs import set_verbosity


def run_backbones(
    families: Annotated[list[str] | None, typer.Argument(help="Families (model types) to say more about.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure on the installed transformers.")] = False,
    write: Annotated[
        str | None, typer.Option("--write", help="With --measure: the page to write; the table goes beside the code.")
    ] = None,
) -> None:
    """Print which text and vision backbones and which VLMs of transformers can be upcycled, and why others cannot.

    A tiny model of each family went through the conversion. Named families are described; with --measure they, or all
    (some minutes), are measured again.
    """
    if write is not None and (families or not measure):
        raise ValueError("--write writes the whole table; give it with --measure, and name no family.")
    if not measure:
        typer.echo(describe_all(find(read_table(), families)) if families else render_list(read_table()))
        return
    from pathlib import Path

    import transformers

    from modeling_vlmoe.conversion.backbones.measuring import check_names, measure_all

    set_verbosity(0, True)
    check_names(families or [])
    rows = []
    for finding in measure_all(families):
        rows.append(finding.to_dict())
        typer.echo(describe(rows[-1]))
    if write is not None:
        write_table(transformers.__version__, rows)
        Path(write).write_text(render_page(read_table()), encoding="utf-8")


def describe_all(rows: list[dict[str, Any]]) -> str:
    """All that is known about these families."""
    return "\n".join(map(describe, rows))


def find(table: dict[str, Any], families: list[str]) -> list[dict[str, Any]]:
    """The rows of these families.

    Raises:
        ValueError: for one that is not in the table.
    """
    check_known(families, {row["family"] for row in table["findings"]}, table["transformers"])
    return [row for row in table["findings"] if row["family"] in families]
