"""What the files of a checkpoint's folder say about it; what no file says is None."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.conversion.delta_arguments import REWRITE_RECEIPT_NAME
from modeling_vlmoe.finetune.control.settings import CONTROL_NAME
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME
from modeling_vlmoe.finetune.settings import SETTINGS_NAME
from modeling_vlmoe.recipe_files import read_recipe
from modeling_vlmoe.weight_fingerprint import count_parameters, fingerprint

from .notes import CardNotes, read_notes
from .side_files import EVAL_RESULTS_NAME, TRAINER_STATE_NAME, read_side_file


@dataclass(frozen=True)
class CardFacts:
    """A folder's files, read.

    Attributes:
        name: the folder's.
        config: config.json as VLMoEConfig; None for an adapter.
        adapter: adapter_config.json; None for a whole model.
        receipt: of the upcycling; empty where there is none.
        runs: the trainings, first to last, as `training_history.json` has them.
        evaluation: `evaluation.json`, where it is about these weights.
        eval_results: what the Trainer evaluated last.
        steps: how far the Trainer had come, in a checkpoint of its own.
        num_stored: parameters in the folder's own safetensors files.
        notes: what its makers say.
        weights: their fingerprint.
        has_other_evaluation: whether there is an `evaluation.json` that does not say it is about these weights.
        control: `control.json`, what a dense control came to, where it is about these weights; else None.
        rewriting: of the last `vlmoe densify` or `vlmoe compress`, where it is about these weights; else empty.
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
    weights: str | None = None
    has_other_evaluation: bool = False
    rewriting: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] | None = None


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The trainings; of a folder that has the settings of the last alone, that one, whose model and data may be paths
    of another machine and are not taken for Hub ids.
    """
    runs = read_side_file(folder, HISTORY_NAME)
    if runs is None and (folder / SETTINGS_NAME).is_file():
        from modeling_vlmoe.finetune.history import describe_settings

        run = describe_settings(read_recipe(folder / SETTINGS_NAME))
        for source in filter(None, (run["model"], run["data"], run["eval_data"])):
            for one in source.get("sources", []):
                one |= {"name": Path(one["name"]).name, "hub_id": None}
            source |= {"name": " + ".join(Path(name).name for name in source["name"].split(" + ")), "hub_id": None}
        runs = [run]
    return runs or []


def are_recorded(facts: CardFacts) -> bool | None:
    """Whether the weights are those that the upcycling, the last training that is told of, or a rewriting of the
    experts wrote; None where no file says which those were.
    """
    if facts.rewriting:
        return True
    upcycled = facts.receipt.get("weights")
    if facts.weights is not None and facts.weights == upcycled:
        return True
    last = facts.runs[-1].get("weights") if facts.runs else None if facts.adapter else upcycled
    if facts.weights is not None and last is not None:
        return facts.weights == last
    total = (facts.receipt.get("parameters") or {}).get("total")
    if facts.runs or facts.adapter is not None or total in (None, facts.num_stored):
        return None
    return False if facts.num_stored else None


def read_facts(folder: str | Path) -> CardFacts:
    """Reads a checkpoint's folder.

    Raises:
        ValueError: when it holds neither a vlmoe model nor an adapter, or a file that cannot be read.
    """
    from modeling_vlmoe import VLMoEConfig

    folder = Path(folder)
    adapter = read_side_file(folder, ADAPTER_CONFIG_NAME)
    written = read_side_file(folder, CONFIG_NAME)
    if adapter is None and (written or {}).get("model_type") != VLMoEConfig.model_type:
        raise ValueError(
            f"{folder} holds no vlmoe model and no adapter: expected a {CONFIG_NAME} of model_type "
            f"{VLMoEConfig.model_type}, or an {ADAPTER_CONFIG_NAME}."
        )
    state = read_side_file(folder, TRAINER_STATE_NAME)
    weights, evaluation = fingerprint(folder), read_side_file(folder, EVALUATION_NAME)
    rewriting = read_side_file(folder, REWRITE_RECEIPT_NAME) or {}
    control = read_side_file(folder, CONTROL_NAME) or {}
    is_other = evaluation is not None and (weights is None or evaluation.get("weights") != weights)
    return CardFacts(
        name=folder.resolve().name,
        config=None if adapter is not None else VLMoEConfig.from_pretrained(folder),
        adapter=adapter,
        receipt=read_side_file(folder, RECEIPT_NAME) or {},
        rewriting=rewriting if weights is not None and rewriting.get("weights") == weights else {},
        runs=read_runs(folder),
        evaluation=None if is_other else evaluation,
        eval_results=read_side_file(folder, EVAL_RESULTS_NAME),
        steps=None if state is None else state.get("global_step"),
        num_stored=count_parameters(folder),
        notes=read_notes(folder),
        weights=weights,
        has_other_evaluation=is_other,
        control=control if weights is not None and control.get("weights") == weights else None,
    )
