"""What the files of a checkpoint's folder say about it; what no file says is None."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME
from modeling_vlmoe.finetune.settings import SETTINGS_NAME
from modeling_vlmoe.recipe_files import read_recipe

from .notes import CardNotes, read_notes

EVAL_RESULTS_NAME, TRAINER_STATE_NAME = "eval_results.json", "trainer_state.json"  # the host's Trainer writes them


@dataclass(frozen=True)
class CardFacts:
    """A folder's files, read.

    Attributes:
        name: the folder's.
        config: config.json as VLMoEConfig; None for an adapter.
        adapter: adapter_config.json; None for a whole model.
        receipt: of the upcycling; empty where there is none.
        runs: the trainings, first to last, as `training_history.json` has them.
        evaluation: `evaluation.json`.
        eval_results: what the Trainer evaluated last.
        steps: how far the Trainer had come, in a checkpoint of its own.
        num_stored: parameters in the folder's own safetensors files.
        notes: what its makers say.
    """

    name: str
    config: Any
    adapter: dict[str, Any] | None
    receipt: dict[str, Any]
    runs: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    eval_results: dict[str, Any] | None
    steps: int | None
    num_stored: int
    notes: CardNotes = field(default_factory=CardNotes)


def read_json_file(path: Path) -> Any:
    """A JSON file's value; None where there is no such file.

    Raises:
        ValueError: when it is broken.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Mend or remove it.") from error


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The trainings; of a folder that has the settings of the last alone, that one, whose model and data may be paths
    of another machine and are not taken for Hub ids.
    """
    runs = read_json_file(folder / HISTORY_NAME)
    if runs is None and (folder / SETTINGS_NAME).is_file():
        from modeling_vlmoe.finetune.history import describe_settings

        run = describe_settings(read_recipe(folder / SETTINGS_NAME))
        for source in filter(None, (run["model"], run["data"], run["eval_data"])):
            source |= {"name": Path(source["name"]).name, "hub_id": None}
        runs = [run]
    return runs or []


def count_stored(folder: Path, is_adapter: bool) -> int:
    """The parameters in a folder's weights, from the headers of its files."""
    count = 0
    for file in folder.glob(ADAPTER_SAFE_WEIGHTS_NAME if is_adapter else "model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                count += size
    return count


def read_facts(folder: str | Path) -> CardFacts:
    """Reads a checkpoint's folder.

    Raises:
        ValueError: when it holds neither a vlmoe model nor an adapter, or a file that cannot be read.
    """
    from modeling_vlmoe import VLMoEConfig

    folder = Path(folder)
    adapter = read_json_file(folder / ADAPTER_CONFIG_NAME)
    written = read_json_file(folder / CONFIG_NAME)
    if adapter is None and (written or {}).get("model_type") != VLMoEConfig.model_type:
        raise ValueError(
            f"{folder} holds no vlmoe model and no adapter: expected a {CONFIG_NAME} of model_type "
            f"{VLMoEConfig.model_type}, or an {ADAPTER_CONFIG_NAME}."
        )
    state = read_json_file(folder / TRAINER_STATE_NAME)
    return CardFacts(
        name=folder.resolve().name,
        config=None if adapter is not None else VLMoEConfig.from_pretrained(folder),
        adapter=adapter,
        receipt=read_json_file(folder / RECEIPT_NAME) or {},
        runs=read_runs(folder),
        evaluation=read_json_file(folder / EVALUATION_NAME),
        eval_results=read_json_file(folder / EVAL_RESULTS_NAME),
        steps=None if state is None else state.get("global_step"),
        num_stored=count_stored(folder, adapter is not None),
        notes=read_notes(folder),
    )
