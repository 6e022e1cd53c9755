"""`control.json`: the difference between a sparse model and its dense control, with its spread, beside the model.

    {"format": 1, "match": "tokens", "seeds": [0, 1, 2], "data": {...},
     "stages": [{"name": "tune", "steps": {"sparse": 100, "dense": 100}, "flops": null, "differs": {...}}],
     "runs": [{"arm": "sparse", "seed": 0, "answer_nll": 0.41, "parameters": 1000, "weights": "..."}],
     "measures": {"answer_nll": {"n": 200, "this model": {...}, "control": {...}, "difference": {...}}},
     "weights": "..."}

`weights` is the fingerprint of the weights that it is about: beside others the card does not show it.
"""

import json
from pathlib import Path
from typing import Any

from modeling_vlmoe.weight_fingerprint import count_parameters, fingerprint

from ..arguments import FinetuneArguments
from ..chain.seen_records import steps_taken
from ..chain.whole_checkpoints import write_atomically
from ..evaluate.judging import CONTROL, DIFFERENCE, THIS, Judged
from ..sources import describe_sources
from .arms import DENSE, SPARSE, Pair
from .matching import Counts
from .settings import CONTROL_NAME, ControlSettings
from .tables import match_words, spread_words

FORMAT = 1
ARMS = {SPARSE: THIS, DENSE: CONTROL}


def describe_stages(pair: Pair, counts: Counts) -> list[dict[str, Any]]:
    """What both did, stage by stage."""
    found = []
    for stage in pair.dense.stages:
        if stage.upcycle is not None:
            continue
        twin = pair.sparse.stages[pair.shared[stage.number] - 1]
        found.append(
            {
                "name": twin.name,
                "steps": {SPARSE: steps_taken(twin), DENSE: steps_taken(stage)},
                "flops": counts.get(twin.name),
                "differs": pair.differs[twin.name],
            }
        )
    return found


def describe_runs(pairs: list[Pair], each: dict[str, list[float]], measure: str) -> list[dict[str, Any]]:
    """Every run, and its number."""
    found = []
    for index, pair in enumerate(pairs):
        for arm, chain in ((SPARSE, pair.sparse), (DENSE, pair.dense)):
            run = {"arm": arm, "seed": pair.seed, measure: each[ARMS[arm]][index]}
            found.append(run | {"parameters": count_parameters(chain.result), "weights": fingerprint(chain.result)})
    return found


def describe_pairs(
    pairs: list[Pair],
    counts: list[Counts],
    control: ControlSettings,
    args: FinetuneArguments,
    likelihoods: Judged,
    each: dict[str, list[float]],
    measures: dict[str, Any],
) -> dict[str, Any]:
    """What control.json says."""
    (line,) = likelihoods.measures
    source = args.data if args.eval_data is None else args.eval_data
    return {
        "format": FORMAT,
        "match": control.control_match,
        "seeds": [pair.seed for pair in pairs],
        "data": describe_sources(source),
        "stages": describe_stages(pairs[0], counts[0]),
        "runs": describe_runs(pairs, each, line.label),
        "measures": {line.label: line.as_dict()} | measures,
        "weights": fingerprint(pairs[0].sparse.result),
    }


def write_report(folder: Path, found: dict[str, Any]) -> None:
    """Writes control.json into a model's folder."""
    write_atomically(folder / CONTROL_NAME, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def difference_words(found: dict[str, Any]) -> str:
    """The difference in sentences."""
    said = [
        f"{name}: sparse minus dense {values[DIFFERENCE]['mean']:+.4f} ± {values[DIFFERENCE]['std']:.4f}"
        for name, values in found["measures"].items()
    ]
    return "\n".join([*said, match_words(found), spread_words(found)])
