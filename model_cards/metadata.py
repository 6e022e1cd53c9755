"""A card's metadata: base models and their relation, licence, task, library, data sets."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .facts import CardFacts
from .licences import Licence, combine_licences
from .usages import find_usage

TAGS = ["vlmoe", "mixture-of-experts", "upcycled"]


def hub_ids(parent: dict[str, Any]) -> list[str]:
    """A parent's Hub id; of one that is not on the Hub, those of its own parents."""
    if parent.get("hub_id"):
        return [parent["hub_id"]]
    return [name for one in parent.get("parents", {}).values() for name in hub_ids(one)]


def without_repeats(names: Iterable[str]) -> list[str]:
    """Names in order, each once."""
    return list(dict.fromkeys(names))


def adapter_base(facts: CardFacts) -> str | None:
    """The Hub id of an adapter's model; None for a folder of the machine that trained it."""
    base = (facts.adapter or {}).get("base_model_name_or_path") or ""
    is_path = not base or Path(base).is_absolute() or base.startswith((".", "~")) or Path(base).is_dir()
    return None if is_path else base


def base_models(facts: CardFacts) -> tuple[list[str], str | None]:
    """The Hub ids of what the model was made of, and the relation; local folders are left out, repeats too."""
    if facts.adapter is not None:
        base = adapter_base(facts)
        return ([base], "adapter") if base else ([], None)
    tuned = [run["model"]["hub_id"] for run in facts.runs if (run.get("model") or {}).get("hub_id")]
    if tuned:
        return [tuned[-1]], "finetune"
    ids = without_repeats(name for parent in (facts.receipt.get("parents") or {}).values() for name in hub_ids(parent))
    return ids, "merge" if ids else None


def stated_by(facts: CardFacts) -> tuple[str, Licence] | None:
    """The last tuned model whose card states a licence, and that licence."""
    tuned = [run["model"] for run in facts.runs if (run.get("model") or {}).get("license")]
    return (tuned[-1].get("name") or "the tuned model", dict(tuned[-1]["license"])) if tuned else None


def inherited_licence(facts: CardFacts) -> Licence:
    """What follows from the parents' licences."""
    return combine_licences((facts.receipt.get("parents") or {}).values())


def find_licence(facts: CardFacts) -> Licence:
    """The licence that the tuned model's card states, else what follows from the parents'."""
    stated = stated_by(facts)
    return stated[1] if stated else inherited_licence(facts)


def build_metadata(facts: CardFacts) -> ModelCardData:
    """The metadata of a folder's card."""
    ids, relation = base_models(facts)
    is_adapter = facts.adapter is not None
    data = [run[name] for run in facts.runs for name in ("data", "eval_data") if run.get(name)]
    sources = [source for one in data for source in one.get("sources") or [one]]
    datasets = without_repeats(source["hub_id"] for source in sources if source.get("hub_id"))
    given: dict[str, Any] = {
        "base_model": ids,
        "base_model_relation": relation,
        **find_licence(facts),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": find_usage(facts).task,
        "tags": [*TAGS, *(["lora"] if is_adapter else [])],
        "datasets": datasets,
    }
    return ModelCardData(**{name: value for name, value in given.items() if value})
