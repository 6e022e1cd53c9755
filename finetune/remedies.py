"""What makes a training step smaller: other settings of the recipe, or delta experts, each with its own estimate."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from modeling_vlmoe.moe_config import PARTS

from .arguments import FinetuneArguments
from .hollow_models import model_dtype
from .memory_plan import MemoryPlan, estimate
from .plan_batch import Batch

# Makes a batch of so many rows.
MakeBatch = Callable[[int], Batch]
WORTH = 0.97  # of the peak: what saves less is not named
RANK = 16  # of the delta experts that are named


@dataclass(frozen=True)
class Remedy:
    """A way to do with less memory.

    Attributes:
        how: what to give, or to run.
        price: what it costs.
        plan: what a step takes then.
    """

    how: str
    price: str
    plan: MemoryPlan


@dataclass(frozen=True)
class _Change:
    """Settings of the recipe, or another configuration of the model."""

    how: str
    price: str
    settings: dict[str, Any]
    config: Any = None


def _as_delta(config: Any) -> Any:
    """The configuration with delta experts in the place of whole ones; None where it has none of these."""
    changed = copy.deepcopy(config)
    whole = [moe for part in PARTS if (moe := changed.moe(part)) is not None and moe.expert_type != "delta"]
    for moe in whole:
        moe.expert_type, moe.expert_rank = "delta", RANK
    return changed if whole else None


def _changes(config: Any, args: FinetuneArguments) -> Iterator[_Change]:
    """What could be changed, the cheapest first."""
    rows = args.per_device_train_batch_size
    smaller: dict[str, Any] = {}
    if rows > 1:
        steps = args.gradient_accumulation_steps * rows
        smaller = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
        how = f"per_device_train_batch_size=1 gradient_accumulation_steps={steps}"
        yield _Change(how, "the same training, slower", smaller)
    if not args.activation_checkpointing:
        lighter = {"activation_checkpointing": True}
        yield _Change("activation_checkpointing=true", "about a third more time", lighter)
        if smaller:
            both = f"activation_checkpointing=true {how}"
            yield _Change(both, "the same training, slower still", smaller | lighter)
    if model_dtype(config, args.dtype) == torch.float32:
        yield _Change("dtype=bfloat16", "weights are rounded", {"dtype": "bfloat16"})
    if (changed := _as_delta(config)) is not None:
        how = f"vlmoe compress {args.model} --rank {RANK} --output-dir OUT, and tune OUT"
        yield _Change(how, "experts share a base: another model", {}, changed)
    if args.method != "lora":
        return
    if args.lora_targets != ["attention"]:
        yield _Change("lora_targets=attention", "experts and MLPs do not learn", {"lora_targets": ["attention"]})
    if args.lora_r > 4:
        yield _Change("lora_r=4", "a narrower adapter", {"lora_r": 4})
    yield _Change("method=align", "only the connector learns", {"method": "align"})


def has_images(batch: Batch) -> bool:
    """Whether there is more in a batch than text."""
    return any(value.is_floating_point() for value in batch.values())


def find_remedies(config: Any, args: FinetuneArguments, make_batch: MakeBatch, plan: MemoryPlan) -> Iterator[Remedy]:
    """The ways to do with less, the cheapest first, each with its estimate.

    Args:
        config: the model's.
        args: the recipe.
        make_batch: gives a batch of so many rows.
        plan: what a step takes as it is.
    """
    for change in _changes(config, args):
        changed = copy.copy(args)
        for name, value in change.settings.items():
            setattr(changed, name, value)
        batch = make_batch(min(changed.per_device_train_batch_size, plan.num_rows))
        if changed.method == "align" and not has_images(batch):
            continue  # nothing would be learnt
        found = estimate(change.config or config, changed, batch)
        if found.peak <= WORTH * plan.peak:
            yield Remedy(change.how, change.price, found)


def three_remedies(remedies: list[Remedy], capacity: float | None) -> list[Remedy]:
    """The three to name: those that fit first, else those that save most; in their own order.

    Args:
        remedies: as found.
        capacity: bytes of the device; None where it is not known.
    """
    fitting = [one for one in remedies if capacity is not None and one.plan.fits(capacity)]
    others = sorted((one for one in remedies if one not in fitting), key=lambda one: one.plan.peak)
    chosen = (fitting + others)[:3]
    return [one for one in remedies if one in chosen]


def of_fewer_rows(batch: Batch, num_rows: int, wanted: int) -> Batch:
    """The first rows of a batch whose rows are alike, with their images.

    Args:
        batch: the inputs.
        num_rows: how many rows it has.
        wanted: how many are left.
    """
    return {name: value[: len(value) // num_rows * wanted] for name, value in batch.items()}
