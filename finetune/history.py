"""`training_history.json`: every training that a model has been through, first to last; no path of the machine.

A run takes the history of the model that it tunes and adds itself, so that a card can tell of the alignment before the
adapter, and of the dense model's tuning before the upcycling.
"""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerState

from modeling_vlmoe.companions import CARD_NAME, HISTORY_NAME
from modeling_vlmoe.model_cards.licences import stated_licence
from modeling_vlmoe.weight_fingerprint import fingerprint

from .data_formats.names import AUTO
from .settings import METHODS, is_heard
from .sources import describe_source, describe_sources

# Settings that are told apart, and those that are about the machine or about what a run writes while it runs.
TOLD_APART = ("method", "model", "model_revision", "data", "eval_data")
NOT_ABOUT_THE_MODEL = (
    "output_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "force",
    "merge",
    "trust_remote_code",
    "disable_tqdm",
    "use_cpu",
    "report_to",
    "hub_model_id",
    "push_to_hub",
    "run_name",
    "log_router_load",
    "router_alarms",
    "image_folder",
    "ignore_data_skip",
    "watch",
    "watch_steps",
    "fsdp_size",
    "save_only_model",
    "ddp_find_unused_parameters",
    "ep_size",
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
)
OF_STREAMS = ("streaming", "shuffle_buffer")


def is_said(name: str, settings: dict[str, Any]) -> bool:
    """Whether a setting of how data are read says something: a form that was named, and of a stream how it is read."""
    if name == "data_format":
        return bool(settings[name] != AUTO)
    return name not in OF_STREAMS or bool(settings.get("streaming"))


def describe_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A run as its resolved settings tell it: what was tuned, on what, how."""
    told = {**dict.fromkeys(TOLD_APART), **settings}
    kept = {
        name: value
        for name, value in settings.items()
        if name not in (*TOLD_APART, *NOT_ABOUT_THE_MODEL)
        and value is not None
        and not (isinstance(value, str) and Path(value).is_absolute())
        and is_said(name, settings)
        and is_heard(name, told["method"] or METHODS[0])
    }
    return {
        "method": told["method"],
        "model": describe_source(told["model"]) | {"revision": told["model_revision"]} if told["model"] else {},
        "data": describe_sources(told["data"]) if told["data"] else None,
        "eval_data": describe_source(told["eval_data"]) if told["eval_data"] else None,
        "settings": kept,
    }


def describe_run(
    settings: dict[str, Any],
    base: Any,
    num_rows: int | None = None,
    state: TrainerState | None = None,
    trained: dict[str, list[int]] | None = None,
) -> dict[str, Any]:
    """A run with what it found: the tuned model's commit and licence, the data's rows, the steps taken.

    Args:
        settings: the resolved recipe.
        base: the model that was tuned.
        num_rows: rows of the training data; with `data_weights` the rows that a pass draws of them.
        state: the Trainer's.
        trained: for each part the numbers that were trained, and its own.
    """
    run = describe_settings(settings)
    if run["model"]:
        run["model"]["revision"] = getattr(base.config, "_commit_hash", None) or run["model"]["revision"]
        run["model"]["license"] = stated_licence(base.companions.get(CARD_NAME, ""))
    if run["data"]:
        run["data"]["draws" if settings.get("data_weights") else "rows"] = num_rows
    run["steps"], run["epochs"] = (None, None) if state is None else (state.global_step, state.epoch)
    if trained is not None:
        run["trained"] = {part: {"trained": learnt, "of": own} for part, (learnt, own) in trained.items()}
    return run


def write_history(folder: Path, base: Any, run: dict[str, Any]) -> None:
    """Writes the history of the tuned model, with this run at its end, into a folder that holds what the run wrote."""
    write_runs(folder, [*json.loads(base.companions.get(HISTORY_NAME, "[]")), run])


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Writes a history whose last run, as trained or merged, gave the weights in the folder."""
    runs = [*runs[:-1], {**runs[-1], "weights": fingerprint(folder)}]
    (folder / HISTORY_NAME).write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
