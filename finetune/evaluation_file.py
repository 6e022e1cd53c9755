"""`evaluation.json`: an accuracy with what it is read against, beside the model it was measured on.

    {"metric": "...", "data": {"name": "test.jsonl", "hub_id": null}, "n": 2000, "accuracy": 0.98,
     "interval": [0.97, 0.99], "groups": {"colour": {"n": 400, ...}},
     "weights": "...", "controls": {"majority answer": {"n": 2000, ...}}}

`weights` is the fingerprint of the weights it was measured on: beside others it is not shown, and a run that writes
others removes it. `controls` names whatever was measured on the same questions: the majority answer, shuffled images,
the LLM alone, the dense model. The model card shows the file as it is.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling_vlmoe.weight_fingerprint import fingerprint

from .sources import describe_sources

EVALUATION_NAME = "evaluation.json"
METRIC = "exact match of the normalised answer, with 95 % Wilson intervals"


def describe_share(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result of `VQAExactMatch` as the file holds it."""
    share = {"n": result["count"], "accuracy": result["accuracy"], "interval": [result["low"], result["high"]]}
    if result.get("groups"):
        share["groups"] = {name: describe_share(group) for name, group in result["groups"].items()}
    return share


def write_evaluation(
    folder: str | Path,
    result: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, Any]] | None = None,
    data: str | Sequence[str] | None = None,
    metric: str = METRIC,
) -> Path:
    """Writes what `evaluate_vqa`, or `vlmoe evaluate`, found about the model in a folder.

    Args:
        folder: the model's.
        result: of `evaluate_vqa`.
        controls: results of `evaluate_vqa` or `majority_baseline` on the same questions, by what they are called.
        data: what was asked: a path, of which the name is kept, or a Hub id; or several.
        metric: what the accuracy is.

    Returns:
        The file.
    """
    values = {"metric": metric, "data": None if data is None else describe_sources(data), **describe_share(result)}
    values["weights"] = fingerprint(Path(folder))
    values["controls"] = {name: describe_share(control) for name, control in (controls or {}).items()}
    path = Path(folder) / EVALUATION_NAME
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def drop_stale_evaluation(folder: Path) -> None:
    """Removes an evaluation that is not of the weights that a folder holds."""
    path = folder / EVALUATION_NAME
    if path.is_file() and f'"{fingerprint(folder)}"' not in path.read_text(encoding="utf-8", errors="replace"):
        path.unlink()
