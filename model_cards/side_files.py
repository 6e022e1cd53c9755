"""The files beside the weights, read with care: a person or another tool may have changed them.

What a reader relies on is written down once, as shapes: a type, a dict of keys (those with a `?` may be missing or
null), `[shape]` for a list, `(shape, shape)` for a list of that length, `Named(shape)` for any names.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.conversion.delta_arguments import REWRITE_RECEIPT_NAME
from modeling_vlmoe.finetune.control.settings import CONTROL_NAME
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME

EVAL_RESULTS_NAME, TRAINER_STATE_NAME = "eval_results.json", "trainer_state.json"  # the host's Trainer writes them


@dataclass(frozen=True)
class Named:
    """A mapping of any names to values of one shape."""

    shape: Any


NUMBER = int | float
LICENCE: dict[str, Any] = {"license": str, "license_name?": str, "license_link?": str}
PARENT: dict[str, Any] = {"name": str, "hub_id?": str, "revision?": str, "license?": LICENCE, "model_type?": str}
PARENT["parents?"] = Named(PARENT)
MOE: dict[str, Any] = {"num_experts": int | list, "num_experts_per_tok": int, "layers?": [int]}
MOE |= {"modality_routing?": str, "modality_experts?": (int, int, int)}
CAST: dict[str, Any] = {"parent": str, "source": str, "target": str, "is_exact": bool}
CONVERSION: dict[str, Any] = {"text_moe?": MOE, "vision_moe?": MOE, "connector_moe?": MOE, "casts?": [CAST]}
CONVERSION |= {"expert_init": str, "router_init": str, "dtype": str, "num_image_tokens?": int}
RECEIPT: dict[str, Any] = {
    "parents?": Named(PARENT),
    "settings?": CONVERSION,
    "seed?": int,
    "parameters?": {"total": int, "active": int},
    "proof?": {"largest_gap?": NUMBER, "largest_gap_limit?": NUMBER, "lossy?": Named(NUMBER)},
    "versions?": Named(str),
    "weights?": str,
}
REWRITING: dict[str, Any] = {"kind": str, "parameters": {"total": int, "active": int}, "weights?": str}
REWRITING["gaps?"] = {"informative?": Named(NUMBER)}
SOURCE: dict[str, Any] = {"name?": str, "hub_id?": str}
TUNED: dict[str, Any] = SOURCE | {"revision?": str, "license?": LICENCE}
RUN: dict[str, Any] = {"method?": str, "model?": TUNED, "data?": SOURCE | {"rows?": int}, "eval_data?": SOURCE}
RUN |= {"settings?": Named(object), "steps?": int, "weights?": str, "trained?": Named({"trained": int, "of": int})}
SHARE: dict[str, Any] = {"n": int, "accuracy": NUMBER, "interval": (NUMBER, NUMBER)}
SHARES: dict[str, Any] = SHARE | {"groups?": Named(SHARE)}
EVALUATION: dict[str, Any] = SHARES | {"metric": str, "data?": SOURCE, "controls?": Named(SHARES), "weights?": str}
ESTIMATE: dict[str, Any] = {"mean": NUMBER, "std": NUMBER, "interval": (NUMBER, NUMBER)}
COMPARED: dict[str, Any] = {"n": int, "this model": ESTIMATE, "control": ESTIMATE, "difference": ESTIMATE}
CONTROLLED: dict[str, Any] = {"name": str, "steps": {"sparse": int, "dense": int}, "differs?": Named(object)}
CONTROL: dict[str, Any] = {"match": str, "seeds": [int], "data": SOURCE, "stages": [CONTROLLED], "weights?": str}
CONTROL["measures"] = Named(COMPARED)
SHAPES: dict[str, Any] = {
    CONTROL_NAME: CONTROL,
    RECEIPT_NAME: RECEIPT,
    REWRITE_RECEIPT_NAME: REWRITING,
    HISTORY_NAME: [RUN],
    EVALUATION_NAME: EVALUATION,
    EVAL_RESULTS_NAME: {"eval_loss?": NUMBER},
    TRAINER_STATE_NAME: {"global_step?": int},
    CONFIG_NAME: {"model_type?": str},
    ADAPTER_CONFIG_NAME: {"base_model_name_or_path?": str},
}


def children(value: Any, shape: Any) -> Iterable[tuple[str, Any, Any]]:
    """The parts of a mapping or list: what each is called, its value, its shape."""
    if isinstance(shape, Named):
        return ((str(name), one, shape.shape) for name, one in value.items())
    if isinstance(shape, dict):
        keys = ((name.removesuffix("?"), name.endswith("?"), one) for name, one in shape.items())
        return (
            (name, value.get(name), one) for name, may_miss, one in keys if not may_miss or value.get(name) is not None
        )
    shapes = shape if isinstance(shape, tuple) else shape * len(value)
    return ((str(number), one, own) for number, (one, own) in enumerate(zip(value, shapes, strict=True)))


def find_misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """What of a value is not of its shape, in words; None where all is."""
    kind = dict if isinstance(shape, dict | Named) else list if isinstance(shape, list | tuple) else shape
    is_of_length = not isinstance(shape, tuple) or (isinstance(value, list) and len(value) == len(shape))
    if not isinstance(value, kind) or not is_of_length:
        wanted = {dict: "a mapping", list: f"a list of {len(shape)}" if isinstance(shape, tuple) else "a list"}
        said = wanted.get(kind, getattr(kind, "__name__", "a number"))
        return f"{where or 'all of it'} is {json.dumps(value)[:40]}, expected {said}"
    if not isinstance(shape, dict | Named | list | tuple):
        return None
    parts = (find_misfit(one, own, f"{where}.{name}" if where else name) for name, one, own in children(value, shape))
    return next(filter(None, parts), None)


def parse_side_file(text: str, name: str, where: str) -> Any:
    """A file's value.

    Args:
        text: of the file.
        name: of the file.
        where: the file is, for what is said if it is broken.

    Raises:
        ValueError: when it is broken.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}. Mend or remove it.") from error
    if misfit := find_misfit(value, SHAPES[name]):
        raise ValueError(f"{where} is not as it should be: {misfit}. Mend or remove it.")
    return value


def read_side_file(folder: Path, name: str) -> Any:
    """A file's value; None where there is no such file.

    Raises:
        ValueError: when it is broken.
    """
    path = folder / name
    if not path.is_file():
        return None
    return parse_side_file(path.read_text(encoding="utf-8", errors="replace"), name, str(path))


def check_companions(companions: Mapping[str, str], model: str) -> None:
    """Refuses a model whose receipt or history is broken, before anything is made of it.

    Raises:
        ValueError: naming the file.
    """
    for name in (RECEIPT_NAME, HISTORY_NAME):
        if name in companions:
            parse_side_file(companions[name], name, f"{name} of the model {model}")
