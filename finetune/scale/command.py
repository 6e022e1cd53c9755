"""`vlmoe configs [NAME]`: the launch configurations that are shipped, listed, printed or written."""

from pathlib import Path
from typing import Annotated

import typer

from ..settings import nearest
from .configs import shipped_configs


def first_sentence(path: Path) -> str:
    """What a configuration is, from the comment at its top."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines).split(". ")[0].rstrip(".")


def list_configs() -> str:
    """One line for each."""
    return "\n".join(f"{name:8} {first_sentence(path)}" for name, path in shipped_configs().items())


def find_config(name: str) -> Path:
    """The file of a name.

    Raises:
        ValueError: with the names there are.
    """
    known = shipped_configs()
    if name not in known:
        raise ValueError(f"NAME is {name!r}; expected one of {', '.join(known)}.{nearest([name], known)}")
    return known[name]


def run_configs(
    name: Annotated[str | None, typer.Argument(help="Which to print; not given: all are listed.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="The folder to write NAME.yaml to, or all of them.")
    ] = None,
) -> None:
    """List, print or write the launch configurations for several processes: ddp, fsdp2, fsdp_ep, zero3.

    For example: vlmoe configs zero3 --output-dir . && accelerate launch --config_file zero3.yaml -m modeling_vlmoe
    finetune full model=... data=... output_dir=...
    """
    chosen = list(shipped_configs().values()) if name is None else [find_config(name)]
    if output_dir is None:
        typer.echo(list_configs() if name is None else chosen[0].read_text(encoding="utf-8").rstrip())
        return
    if there := [path.name for path in chosen if (output_dir / path.name).exists()]:
        raise ValueError(f"--output-dir {output_dir} has {', '.join(there)} already; name another folder.")
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in chosen:
        (output_dir / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        typer.echo(str(output_dir / path.name))
