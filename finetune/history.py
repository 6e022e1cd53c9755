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

from .settings import FinetuneSettings
from .sources import describe_source

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
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
)


def describe_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A run as its resolved settings tell it: what was tuned, on what, how."""
    told = {**dict.fromkeys(TOLD_APART), **settings}
    kept = {
        name: value
        for name, value in settings.items()
        if name not in (*TOLD_APART, *NOT_ABOUT_THE_MODEL)
        and value is not None
        and not (isinstance(value, str) and Path(value).is_absolute())
        and (told["method"] == "lora" or not is_for_lora(name))
    }
    return {
        "method": told["method"],
        "model": describe_source(told["model"]) | {"revision": told["model_revision"]} if told["model"] else {},
        "data": describe_source(told["data"]) if told["data"] else None,
        "eval_data": describe_source(told["eval_data"]) if told["eval_data"] else None,
        "settings": kept,
    }


def is_for_lora(name: str) -> bool:
    """Whether a setting says nothing where the method is not `lora`."""
    return name in vars(FinetuneSettings()) and name.startswith(("lora_", "train_routers", "train_connector"))


def describe_run(
    settings: dict[str, Any], base: Any, num_rows: int | None = None, state: TrainerState | None = None
) -> dict[str, Any]:
    """A run with what it found: the tuned model's commit and licence, the data's rows, the steps taken.

    Args:
        settings: the resolved recipe.
        base: the model that was tuned.
        num_rows: rows of the training data.
        state: the Trainer's.
    """
    run = describe_settings(settings)
    if run["model"]:
        run["model"]["revision"] = getattr(base.config, "_commit_hash", None) or run["model"]["revision"]
        run["model"]["license"] = stated_licence(base.companions.get(CARD_NAME, ""))
    if run["data"]:
        run["data"]["rows"] = num_rows
    run["steps"], run["epochs"] = (None, None) if state is None else (state.global_step, state.epoch)
    return run


def write_history(folder: Path, base: Any, run: dict[str, Any]) -> None:
    """Writes the history of the tuned model, with this run at its end, into a folder that holds what the run wrote."""
    write_runs(folder, [*json.loads(base.companions.get(HISTORY_NAME, "[]")), run])


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Writes a history whose last run, as trained or merged, gave the weights in the folder."""
    runs = [*runs[:-1], {**runs[-1], "weights": fingerprint(folder)}]
    (folder / HISTORY_NAME).write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
