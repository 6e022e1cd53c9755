"""`vlmoe evaluate CHECKPOINT TASK`: what it shows and does. Nothing heavy is imported before it runs."""

from typing import Annotated, Any

import typer

from ..data_formats.names import AUTO, FORMAT_NAMES
from .settings import SUITES, TASK_NAMES, EvaluateSettings


def option(text: str, *names: str, **kwargs: Any) -> Any:
    """An option whose default needs no telling."""
    return typer.Option(*names, help=text, show_default=False, **kwargs)


def run_evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A vlmoe model or an adapter: a folder, or a model's Hub id.")],
    task: Annotated[
        str | None,
        typer.Argument(help=f"What is asked: {', '.join(TASK_NAMES)}; left out with --suite.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        option("Rows as vlmoe finetune reads them: a file, a folder or a Hub id; for a task; several are mixed."),
    ] = None,
    data_format: Annotated[
        str, typer.Option("--format", help=f"The form of the rows: {', '.join(FORMAT_NAMES)}.")
    ] = AUTO,
    image_folder: Annotated[
        str | None, option("The folder that paths of images are counted from [default: the data file's].")
    ] = None,
    question: Annotated[str | None, option("What captioned and labelled images are asked.")] = None,
    suite: Annotated[str | None, option(f"Public benchmarks from their own files: {', '.join(SUITES)}.")] = None,
    data_dir: Annotated[str | None, option("The folder of a suite's files, a folder per benchmark.")] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of results, predictions and tables.")] = "evaluation",
    split: Annotated[str, typer.Option(help="The split of data that is no single file.")] = "test",
    answers: Annotated[
        str | None,
        option(
            "The field of every row's answers [default: answers, where a row has it, else what the assistant says]."
        ),
    ] = None,
    by: Annotated[
        str | None, option("A field of the rows: the measure for each of its values, and the worst one's gap.")
    ] = None,
    also: Annotated[
        list[str] | None, option("The same training under another seed; once for each. The spread is over them.")
    ] = None,
    control: Annotated[
        list[str] | None,
        option("What it is compared with, a vlmoe model or a dense VLM; given once, or once for each checkpoint."),
    ] = None,
    shuffle_images: Annotated[
        bool, typer.Option("--shuffle-images", help="Ask with other rows' images too, as a control.")
    ] = False,
    samples: Annotated[int, typer.Option(help="How often rows are drawn again for the spread.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of that drawing, and of shuffling images.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions of a batch.")] = 8,
    max_new_tokens: Annotated[int | None, option("Tokens of an answer [default: the task's].")] = None,
    limit: Annotated[int | None, option("At most so many questions of each set, evenly spaced.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the result into the checkpoint's folder, and show it in its card.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, not as tables.")] = False,
    revision: Annotated[str | None, option("Branch, tag or commit of the model on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a model carries.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier result in the folder.")] = False,
) -> None:
    """Measure what a model answers, with the spread, beside a control, and by group; or on public benchmarks.

    For example:
    vlmoe evaluate tuned/merged vqa --data questions.jsonl --by kind --control dense/merged;
    vlmoe evaluate tuned/merged --suite llava --data-dir benchmarks
    """
    settings = EvaluateSettings(
        checkpoint,
        task,
        data=data[0] if data is not None and len(data) == 1 else data or None,
        data_format=data_format,
        image_folder=image_folder,
        question=question,
        suite=suite,
        data_dir=data_dir,
        output_dir=output_dir,
        split=split,
        answers=answers,
        by=by,
        also=also or [],
        control=control or [],
        shuffle_images=shuffle_images,
        num_samples=samples,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
        card=card,
        revision=revision,
        trust_remote_code=trust_remote_code,
        force=force,
    )

    from json import dumps

    from modeling_vlmoe import register

    from .run import evaluate_checkpoints

    register()
    results, tables = evaluate_checkpoints(settings, say=lambda text: typer.echo(text, err=True))
    typer.echo(dumps(results, indent=1, ensure_ascii=False) if json else f"{tables}\nwritten to {output_dir}")
