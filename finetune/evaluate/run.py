"""`vlmoe evaluate`, top to bottom: checks, questions, models one by one, answers, numbers, files."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_vlmoe.model_cards import write_card

from ..collator import check_rows
from ..evaluation import generate_answers, shuffled_images
from ..evaluation_file import write_evaluation
from ..sources import describe_source, describe_sources
from ..train import MERGED
from .asked import ANSWERS
from .benchmarks.suites import load_suite
from .judging import CONTROL, THIS, Judged, Line, judge
from .loading import check_checkpoint, load_checkpoint
from .question_sets import QuestionSet, own_questions
from .settings import LATEX, MARKDOWN, OURS, PREDICTIONS, RESULTS, EvaluateSettings
from .tables import latex, markdown

SHUFFLED = "shuffled images"


@dataclass(frozen=True)
class Column:
    """Whose answers stand in a column.

    Attributes:
        name: of the column.
        checkpoints: which give them.
        shuffles: whether they are shown other rows' images.
    """

    name: str
    checkpoints: tuple[str, ...]
    shuffles: bool = False


def columns_of(settings: EvaluateSettings) -> list[Column]:
    """The columns of a run."""
    columns = [Column(THIS, tuple(settings.checkpoints))]
    if settings.control:
        columns.append(Column(CONTROL, tuple(settings.control)))
    if settings.shuffle_images:
        columns.append(Column(SHUFFLED, tuple(settings.checkpoints), shuffles=True))
    return columns


def check_folder(settings: EvaluateSettings) -> Path:
    """The result's folder.

    Raises:
        ValueError: if it holds something else, or an earlier result that is not to be overwritten.
    """
    folder = Path(settings.output_dir)
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder.")
    found = {path.name for path in folder.iterdir()}
    if others := sorted(found - set(OURS)):
        raise ValueError(
            f"output_dir {folder} holds {', '.join(others[:3])}, which vlmoe evaluate did not write; name another "
            "folder."
        )
    if found and not settings.force:
        raise ValueError(f"output_dir {folder} is not empty. Name another folder, or give --force to overwrite it.")
    return folder


def check_card(settings: EvaluateSettings) -> None:
    """Refuses to write into a folder that is not one.

    Raises:
        ValueError: if the checkpoint is none.
    """
    if settings.card and not Path(settings.checkpoint).is_dir():
        raise ValueError(
            f"card writes into the checkpoint's folder, but {settings.checkpoint} is none; download it, or leave card "
            "out."
        )


def name_model(checkpoint: str) -> dict[str, str | None]:
    """What a model is called: a merged one, whose folder has no name of its own, with the run's."""
    known = describe_source(checkpoint)
    if known["name"] == MERGED:
        known["name"] = f"{Path(checkpoint).resolve().parent.name}/{MERGED}"
    return known


def load_questions(settings: EvaluateSettings) -> tuple[list[QuestionSet], dict[str, str]]:
    """All sets of questions, limited as asked for, and why others of the suite are not there.

    Raises:
        ValueError: naming the file or the row that is wrong.
    """
    missing: dict[str, str] = {}
    if settings.suite is None:
        sets = [own_questions(settings)]
    else:
        sets, missing = load_suite(settings.suite, str(settings.data_dir))
    return [questions.limited(settings.limit) for questions in sets], missing


def answer_all(
    checkpoint: str,
    columns: Sequence[Column],
    sets: Sequence[QuestionSet],
    shuffled: Sequence[list[list[Any]] | None],
    settings: EvaluateSettings,
) -> Iterator[tuple[str, int, list[str]]]:
    """A checkpoint's answers, for each column it is in: the column's name, the set's number, the answers."""
    model, processor = load_checkpoint(checkpoint, settings.revision_of(checkpoint), settings.trust_remote_code)
    for number, questions in enumerate(sets):
        check_rows(questions.rows, processor)
        length = settings.max_new_tokens or questions.max_new_tokens
        for column in columns:
            images = shuffled[number] if column.shuffles else None
            answers = generate_answers(model, processor, questions.rows, settings.batch_size, length, images)
            yield column.name, number, answers


def collect_answers(
    sets: Sequence[QuestionSet], settings: EvaluateSettings, say: Callable[[str], None]
) -> list[dict[str, list[list[str]]]]:
    """For each set, by column, the answers of each checkpoint; one model is held at a time."""
    columns = columns_of(settings)
    asked = list(dict.fromkeys(checkpoint for column in columns for checkpoint in column.checkpoints))
    # Before any model is loaded: rows may have images too alike to be shuffled.
    shuffled = [shuffled_images(one.rows, settings.seed) if settings.shuffle_images else None for one in sets]
    given: dict[tuple[str, int, str], list[str]] = {}
    for checkpoint in asked:
        say(f"{checkpoint}: answering {sum(len(questions.rows) for questions in sets)} questions")
        own = [column for column in columns if checkpoint in column.checkpoints]
        for column, number, answers in answer_all(checkpoint, own, sets, shuffled, settings):
            given[column, number, checkpoint] = answers
    return [
        {column.name: [given[column.name, number, one] for one in column.checkpoints] for column in columns}
        for number in range(len(sets))
    ]


def prediction_lines(
    questions: QuestionSet,
    answers: Mapping[str, list[list[str]]],
    statistics: Mapping[str, list[np.ndarray]],
    columns: Mapping[str, tuple[str, ...]],
) -> Iterator[str]:
    """One line of JSON per answer; its score is the headline of its row alone, where a row is one question."""
    is_row = len(questions.units()) == len(questions.rows)
    for column, members in columns.items():
        for place, checkpoint in enumerate(members):
            found = statistics[column][place]
            scores = questions.scoring.measure(found, np.ones(len(found)))[:, 0] if is_row else None
            for index, one in enumerate(questions.asked):
                values = {
                    "set": questions.name,
                    "column": column,
                    "checkpoint": name_model(checkpoint)["name"],
                    "row": index + 1,
                    "id": questions.ids[index] if len(questions.ids) else questions.rows[index].get("row"),
                    "prediction": answers[column][place][index],
                    "answers": list(one.answers),
                    "score": None if scores is None else float(scores[index]),
                }
                yield json.dumps(values, ensure_ascii=False)


def describe_run(settings: EvaluateSettings, judged: Sequence[Judged], missing: Mapping[str, str]) -> dict[str, Any]:
    """What `results.json` says."""
    source = settings.data if settings.suite is None else settings.data_dir
    assert source is not None  # as the settings have checked
    is_own = settings.suite is None
    return {
        "checkpoints": [name_model(one) for one in settings.checkpoints],
        "controls": [name_model(one) for one in settings.control],
        "task": settings.task,
        "suite": settings.suite,
        "data": describe_sources(source),
        "split": settings.split if is_own else None,
        "data_format": settings.data_format if is_own else None,
        "image_folder": settings.image_folder and describe_source(settings.image_folder)["name"],
        "question": settings.question,
        "answers": (settings.answers or ANSWERS) if is_own else None,
        "revision": settings.revision,
        "num_samples": settings.num_samples,
        "seed": settings.seed,
        "limit": settings.limit,
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "sets": {one.name: one.as_dict() for one in judged},
        "missing": dict(missing),
    }


def _share(line: Line, column: str) -> dict[str, Any] | None:
    """A column's estimate as `write_evaluation` takes one."""
    cell = line.cells.get(column)
    return None if cell is None else {"accuracy": cell.mean, "low": cell.low, "high": cell.high, "count": line.count}


def card_values(judged: Judged, column: str) -> dict[str, Any]:
    """A column's headline, overall and by group, as `write_evaluation` takes it."""
    values = _share(judged.measures[0], column)
    assert values is not None
    for groups in judged.groups.values():
        shares = {group.name: _share(group.measures[0], column) for group in groups}
        values["groups"] = {name: share for name, share in shares.items() if share is not None}
    return values


def write_to_card(settings: EvaluateSettings, judged: Judged, num_samples: int) -> None:
    """Writes `evaluation.json` into the checkpoint's folder, and renders its card."""
    columns = columns_of(settings)[1:]
    named = {column.name: name_model(settings.control[0])["name"] for column in columns if column.name == CONTROL}
    controls = {
        f"{CONTROL}: {named[one.name]}" if one.name in named else one.name: card_values(judged, one.name)
        for one in columns
    }
    metric = f"{judged.description}, with 95 % intervals over {num_samples} drawings of the rows"
    write_evaluation(settings.checkpoint, card_values(judged, THIS), controls, data=settings.data, metric=metric)
    write_card(settings.checkpoint)


def evaluate_checkpoints(
    settings: EvaluateSettings, say: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, Any], str]:
    """Measures checkpoints, and writes results, predictions and tables.

    Args:
        settings: what to measure, and where to.
        say: told what is under way.

    Returns:
        What `results.json` says, and the tables in Markdown.

    Raises:
        ValueError: for whatever the user can mend.
    """
    folder = check_folder(settings)
    check_card(settings)
    for checkpoint in dict.fromkeys([*settings.checkpoints, *settings.control]):
        check_checkpoint(checkpoint, settings.revision_of(checkpoint), settings.trust_remote_code)
    sets, missing = load_questions(settings)
    for name, why in missing.items():
        say(f"{name}: not measured, {why}")
    answers = collect_answers(sets, settings, say)
    columns = {column.name: column.checkpoints for column in columns_of(settings)}
    judged: list[Judged] = []
    lines: list[str] = []
    for questions, given in zip(sets, answers, strict=True):
        statistics = {
            column: [questions.scoring.statistics(one, questions.asked) for one in own]
            for column, own in given.items()
        }
        judged.append(
            judge(
                questions.name,
                questions.scoring,
                statistics,
                questions.row_groups(),
                settings.num_samples,
                settings.seed,
                questions.notes,
                questions.averaged,
            )
        )
        lines += prediction_lines(questions, given, statistics, columns)
    results = describe_run(settings, judged, missing)
    models = {column: [str(name_model(one)["name"]) for one in members] for column, members in columns.items()}
    told = (judged, settings.num_samples, len(settings.checkpoints), missing, models)
    written = {
        RESULTS: json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        PREDICTIONS: "".join(f"{line}\n" for line in lines),
        MARKDOWN: markdown(*told),
        LATEX: latex(*told),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    if settings.card:
        write_to_card(settings, judged[0], settings.num_samples)
    return results, written[MARKDOWN]
