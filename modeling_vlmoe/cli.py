"""The `vlmoe` command: each sub-command is a dataclass of settings, from flags or a YAML recipe, and a function.

Nothing heavy is imported before a command runs: help does not wait for torch. Exit codes: 0 done, 2 the user can mend
it (one message says what), 1 anything else.
"""

import errno
import inspect
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from modeling_vlmoe.backbones_command import run_backbones
from modeling_vlmoe.chat_command import run_chat
from modeling_vlmoe.conversion.arguments import NATIVE, UpcycleArguments
from modeling_vlmoe.conversion.delta_arguments import CompressArguments, DensifyArguments
from modeling_vlmoe.conversion.native_arguments import ExportArguments, ImportArguments
from modeling_vlmoe.conversion.routing_arguments import ConvertRoutingArguments
from modeling_vlmoe.finetune.classifier.arguments import ClassifyArguments
from modeling_vlmoe.finetune.command import run_finetune, settings_help
from modeling_vlmoe.finetune.data_check.command import data_app
from modeling_vlmoe.finetune.demo.command import run_demo_command
from modeling_vlmoe.finetune.evaluate.command import run_evaluate
from modeling_vlmoe.finetune.plan_command import run_plan
from modeling_vlmoe.finetune.route.command import run_route
from modeling_vlmoe.finetune.scale.command import run_configs
from modeling_vlmoe.logs import hide_bars, set_verbosity
from modeling_vlmoe.push_arguments import PushArguments
from modeling_vlmoe.recipe_files import read_recipe
from modeling_vlmoe.serve_command import run_serve

FAILED, USER_ERROR = 1, 2
# What a user can mend: a path that is wrong or closed, a network that is not there.
MENDABLE = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    ConnectionError,
)
FLAG_TYPES = {"bool": bool, "int": int, "float": float, "str": str}

app = typer.Typer(
    name="vlmoe",
    help="Sparse Mixture-of-Experts vision-language models from dense parents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Say more; -vv: transformers too.", show_default=False)
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No warnings, no progress bars.")] = False,
) -> None:
    """The choices of every command; also keeps sub-commands sub-commands, however few there are."""
    set_verbosity(verbose, quiet)
    hide_bars(quiet)


def flag_parameters(settings: type) -> list[inspect.Parameter]:
    """One optional flag per field of a settings dataclass (a word where the field says `is_argument`), and `--recipe`.

    What is not given is None.
    """
    parameters = []
    for item in fields(settings):
        flag = item.name.replace("_", "-")
        kind = item.metadata.get("flag") or next(kind for name, kind in FLAG_TYPES.items() if name in str(item.type))
        names = [f"--{flag}/--no-{flag}"] if kind is bool else [f"--{flag}"]
        default = "" if item.default is None or kind is bool else f" [default: {item.default}]"
        option: Any = typer.Option(*names, help=item.metadata["help"] + default, show_default=False)
        if item.metadata.get("is_argument"):
            option = typer.Argument(help=item.metadata["help"], show_default=False)
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    recipe = typer.Option("--recipe", help="YAML file of these settings; flags override it.", show_default=False)
    parameters.append(
        inspect.Parameter(
            "recipe", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, recipe]
        )
    )
    return parameters


def command(name: str, settings: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Makes a function of a settings dataclass a sub-command.

    Args:
        name: What it is called.
        settings: The dataclass; its fields carry their help, `from_dict(values, origin)` checks values.
    """

    def decorate(run: Callable[[Any], None]) -> Callable[[Any], None]:
        def invoke(**given: Any) -> None:
            recipe = given.pop("recipe")
            flags = {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in given.items()
                if value is not None
            }
            values = {} if recipe is None else read_recipe(recipe)
            run(settings.from_dict(values | flags, recipe or "the command line"))

        invoke.__signature__ = inspect.Signature(flag_parameters(settings))  # type: ignore[attr-defined]
        invoke.__doc__ = run.__doc__
        app.command(name)(invoke)
        return run

    return decorate


@command("upcycle", UpcycleArguments)
def run_upcycle(args: UpcycleArguments) -> None:
    """Make a sparse vision-language model of a dense LLM and a dense ViT, or of a dense VLM (--vlm-model).

    It computes what its parents compute: that is proved on the written files, or nothing is written. Parts whose
    --*-experts is not given stay dense; with none of the three given, the LLM gets 8 experts, top-2; with --dense
    none gets any.
    """
    from modeling_vlmoe.conversion import upcycle

    if args.dry_run:
        from modeling_vlmoe.conversion.upcycle import preview

        typer.echo(preview(args))
        return
    output = upcycle(args)
    typer.echo(describe_export(output) if args.format == NATIVE else describe_result(output))


@command("export", ExportArguments)
def run_export(args: ExportArguments) -> None:
    """Write a vlmoe model in transformers' own classes: LLaVA around a sparse LM, or the LM alone (--to text). A VLM
    that is sparse in place becomes its sparse sibling (Qwen3-VL: Qwen3-VL-MoE), or itself around a sparse LM.

    The result needs no code of ours, and computes what the model computes: that is proved on the written files, or
    nothing is written. What cannot be written without loss is refused by name. An adapter is merged first.
    """
    from modeling_vlmoe.conversion import export

    if args.dry_run:
        from modeling_vlmoe.conversion.export import preview_export

        typer.echo(preview_export(args))
        return
    typer.echo(describe_export(export(args)))


def describe_export(output: Any) -> str:
    """What was written, in a few lines."""
    import json

    from modeling_vlmoe.conversion.export import EXPORT_RECEIPT_NAME, describe_receipt

    receipt = json.loads((output / EXPORT_RECEIPT_NAME).read_text(encoding="utf-8"))
    return f"{output}: {describe_receipt(receipt)}\nreceipt: {EXPORT_RECEIPT_NAME}"


@command("import", ImportArguments)
def run_import(args: ImportArguments) -> None:
    """Make a vlmoe model of a sparse LLM and a ViT, or of a LLaVA around a sparse LLM (--vlm-model).

    Mixtral, Qwen2-MoE and Qwen3-MoE keep their experts and routers. The model computes what its parents compute: that
    is proved on the written files, or nothing is written.
    """
    from modeling_vlmoe.conversion import import_native

    if args.dry_run:
        from modeling_vlmoe.conversion.native_import import preview_import

        typer.echo(preview_import(args))
        return
    typer.echo(describe_result(import_native(args)))


@command("densify", DensifyArguments)
def run_densify(args: DensifyArguments) -> None:
    """Write a model's delta experts as experts with weights of their own, as exports, servers and parallelism need.

    It computes what the model computes: that is proved on the written files, or nothing is written.
    """
    run_rewrite("densify", args)


@command("compress", CompressArguments)
def run_compress(args: CompressArguments) -> None:
    """Write a model's experts as delta experts: one base, and pairs of low rank for each expert, by truncated SVD.

    That is another model; how far it is from this one is measured, printed and written down.
    """
    run_rewrite("compress", args)


@command("convert-routing", ConvertRoutingArguments)
def run_convert_routing(args: ConvertRoutingArguments) -> None:
    """Route a model's image tokens and text tokens otherwise in its LLM: --to intra_inter, isolated, ...

    Routers are carried over. While experts are copies of one another the result computes what the model computes,
    which is proved on the written files; else how far it is from it is measured, printed and written down.
    """
    run_rewrite("convert-routing", args)


def run_rewrite(kind: str, args: Any) -> None:
    """Runs one of the three, or says what it would write."""
    from modeling_vlmoe import conversion
    from modeling_vlmoe.conversion.rewriting import describe_rewrite, preview_rewrite

    if args.dry_run:
        typer.echo(preview_rewrite(kind, args))
        return
    typer.echo(describe_rewrite(getattr(conversion, kind.replace("-", "_"))(args)))


def describe_lossy(proof: dict[str, Any]) -> str:
    """What a routing by which copies of the dense MLPs compute something else does."""
    if not (lossy := proof.get("lossy")):
        return ""
    gap = max(lossy.values())
    return f"that is with routing weights that sum to one; as asked for, results move by up to {gap:.1e}\n"


def describe_result(output: Any) -> str:
    """What was written, in a few lines."""
    import json

    from modeling_vlmoe.conversion.receipt import RECEIPT_NAME

    receipt = json.loads((output / RECEIPT_NAME).read_text(encoding="utf-8"))
    parameters, proof = receipt["parameters"], receipt["proof"]
    names = {"text": "LLM", "vision": "ViT", "vlm": "dense model"}
    rounded = [
        f"the {names[cast['parent']]} was rounded from {cast['source']} to {cast['target']}\n"
        for cast in receipt["settings"]["casts"]
        if not cast["is_exact"]
    ]
    missing = receipt["settings"].get("not_proved")
    dense = ", ".join(receipt["settings"].get("dense_vits") or [])
    return (
        f"{output}: {parameters['total']:,} parameters, {parameters['active']:,} active per token\n"
        f"proved equal to its parents{', as rounded' if rounded else ''}: largest gap {proof['largest_gap']:.1e} "
        f"standard deviations (limit {proof['largest_gap_limit']:.1e})\n"
        f"{describe_lossy(proof)}"
        f"{''.join(rounded)}{f'not proved: {missing}{chr(10)}' if missing else ''}"
        f"{f'stays dense: {dense}{chr(10)}' if dense else ''}receipt: {RECEIPT_NAME}"
    )


@command("classify", ClassifyArguments)
def run_classify_command(args: ClassifyArguments) -> None:
    """Train a classifier of images and text whose image experts are routed by the text, and report on it.

    It makes a small dense model, upcycles it and trains both on: per epoch the losses and the accuracy; for the test
    images a report per class, a picture of confusions, and where each kind of question sends the image, beside the
    dense model and logistic regression. Without --data: handwritten digits, no download.
    """
    from modeling_vlmoe.finetune.classifier.run import run_classify

    run_classify(args, say=typer.echo)


@command("push", PushArguments)
def run_push(args: PushArguments) -> None:
    """Push a model or an adapter to the Hub, with its processor, code, receipt and card.

    It is checked first that others can load it. Nothing that others have added to the repository is removed.
    """
    from modeling_vlmoe import register
    from modeling_vlmoe.push import push

    register()
    typer.echo(push(args))


app.command("finetune", epilog=settings_help())(run_finetune)
app.add_typer(data_app, name="data")
app.command("evaluate")(run_evaluate)
app.command("plan")(run_plan)
app.command("route")(run_route)
app.command("configs")(run_configs)
app.command("backbones")(run_backbones)
app.command("demo")(run_demo_command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run_serve)
app.command("chat")(run_chat)


def stop(signum: int, frame: Any) -> None:
    """A polite kill unwinds like Ctrl-C, so that temporary folders are removed."""
    raise KeyboardInterrupt


def main() -> None:
    """Runs the command line and turns what goes wrong into a message and an exit code."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores it
            signal.signal(number, stop)
    try:
        app()
    except ValueError as error:
        typer.echo(f"vlmoe: {error}", err=True)
        sys.exit(USER_ERROR)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            typer.echo(f"vlmoe: {error.strerror}", err=True)
            sys.exit(FAILED)
        if not isinstance(error, MENDABLE) and error.errno is not None:  # without a number a library says it in words
            raise
        typer.echo(f"vlmoe: {error}", err=True)
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
