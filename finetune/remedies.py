"""What makes a training step smaller: other settings of the recipe, smaller batches, or delta experts, each with its
own estimate.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from modeling_vlmoe.moe_config import PARTS

from .arguments import FinetuneArguments
from .gpus import Device
from .hollow_models import model_dtype
from .memory_plan import MemoryPlan, estimate
from .plan_batch import Batch, has_images
from .smaller_batches import MakeBatches

WORTH = 0.97  # of the peak: what saves less is named only where there is little else
NUM_NAMED = 3
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
    """Settings of the recipe, another configuration of the model, or other batches."""

    how: str
    price: str
    settings: dict[str, Any]
    config: Any = None
    batches: list[Batch] | None = None


def _as_delta(config: Any) -> Any:
    """The configuration with delta experts in the place of whole ones; None where it has none of these."""
    changed = copy.deepcopy(config)
    whole = [moe for part in PARTS if (moe := changed.moe(part)) is not None and moe.expert_type != "delta"]
    for moe in whole:
        moe.expert_type, moe.expert_rank = "delta", RANK
    return changed if whole else None


def _setting(price: str, **settings: Any) -> _Change:
    """A change of settings, as a command line gives them."""
    words = {name: str(value).lower() if isinstance(value, bool) else value for name, value in settings.items()}
    words |= {name: "null" for name, value in settings.items() if value is None}
    values = {name: ",".join(value) if isinstance(value, list) else value for name, value in words.items()}
    return _Change(" ".join(f"{name}={value}" for name, value in values.items()), price, settings)


def _same_training(args: FinetuneArguments) -> Iterator[_Change]:
    """What changes nothing of what is learnt."""
    rows, smaller = args.per_device_train_batch_size, {}
    if rows > 1:
        steps = args.gradient_accumulation_steps * rows
        smaller = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield _setting("the same training, slower", **smaller)
    if not args.activation_checkpointing:
        yield _setting("about a third more time", activation_checkpointing=True)
        if smaller:
            yield _setting("the same training, slower still", activation_checkpointing=True, **smaller)


def _optimizers(args: FinetuneArguments) -> Iterator[_Change]:
    """Optimizers with smaller states."""
    name = str(getattr(args.optim, "value", args.optim))
    is_default = name.startswith("adamw_torch")
    if is_default and find_spec("bitsandbytes") is not None:
        yield _setting("its states are rounded", optim="adamw_bnb_8bit")
    for other in ("adafactor",) if is_default else ("adafactor", "sgd"):
        if name not in (other, "sgd"):
            yield _setting("another optimizer: choose its learning rate anew", optim=other)


def _less_learnt(config: Any, args: FinetuneArguments) -> Iterator[_Change]:
    """What trains less."""
    if args.train_connector:
        yield _setting("the connector does not learn", train_connector=False)
    if args.train_routers and any(config.moe(part) is not None for part in args.lora_parts):
        yield _setting("routers do not learn", train_routers=False)
    if args.lora_targets != ["attention"]:
        yield _setting("experts and MLPs do not learn", lora_targets=["attention"])
    if set(args.lora_parts) == {"text", "vision"}:
        yield _setting("the ViT does not learn", lora_parts=["text"])
    if args.quantize_bits is None and not args.lora_dropout and find_spec("bitsandbytes") is not None:
        yield _setting("the LLM's weights are rounded", quantize_bits=4, activation_checkpointing=True)
    if args.lora_r > 4:
        yield _setting("a narrower adapter", lora_r=4)
    elif args.lora_r > 1:
        yield _setting("the narrowest adapter", lora_r=1)
    yield _setting("only the connector learns", method="align")


def _less_trained(config: Any, args: FinetuneArguments) -> Iterator[_Change]:
    """What trains less, where weights themselves are trained."""
    is_sparse = any(config.moe(part) is not None for part in PARTS)
    if args.method == "full" and not args.learning_rates and not args.weight_decays and not args.warmups:
        if args.train in (None, ["all"]):
            yield _setting("the ViT does not learn", train=["all-but-vision"])
        if is_sparse and args.train != ["moe-layers"]:
            yield _setting("only experts and routers learn", train=["moe-layers"])
    if args.method == "full":
        train = {"train": None} if args.train else {}
        yield _setting(
            "LoRA in the LLM: an adapter, and what is not in the LLM does not learn", method="lora", **train
        )
        yield _setting("only the connector learns", method="align", **train)
    if args.method == "delta":
        yield _setting("only the connector learns", method="align")


def _changes(config: Any, args: FinetuneArguments, make_batches: MakeBatches, num_rows: int) -> Iterator[_Change]:
    """What could be changed, the cheapest first."""
    yield from _same_training(args)
    yield from _optimizers(args)
    for how, price, batches in make_batches.cuts(num_rows):
        yield _Change(how, price, {}, batches=batches)
    if model_dtype(config, args.dtype) == torch.float32:
        yield _setting("weights are rounded", dtype="bfloat16")
    if (changed := _as_delta(config)) is not None:
        how = f"vlmoe compress {args.model} --rank {RANK} --output-dir OUT, and tune OUT"
        yield _Change(how, "experts share a base: another model", {}, changed)
    if args.method == "lora":
        yield from _less_learnt(config, args)
    else:
        yield from _less_trained(config, args)
    if args.gradient_accumulation_steps > 1:
        yield _setting("smaller steps: choose the learning rate anew", gradient_accumulation_steps=1)


def estimate_largest(config: Any, args: FinetuneArguments, batches: list[Batch], device: Device) -> MemoryPlan:
    """The plan of that batch which takes the most; arguments as of `estimate`."""
    return max((estimate(config, args, batch, device) for batch in batches), key=lambda plan: plan.peak)


def find_remedies(
    config: Any, args: FinetuneArguments, make_batches: MakeBatches, plan: MemoryPlan, device: Device
) -> Iterator[Remedy]:
    """The ways to do with less, the cheapest first, each with its estimate; at the end, where there are not three,
    those that save little.

    Args:
        config: the model's.
        args: the recipe.
        make_batches: gives batches of so many rows, and smaller ones.
        plan: what a step takes as it is.
        device: what it runs on.
    """
    num_found, small = 0, []
    for change in _changes(config, args, make_batches, plan.num_rows):
        changed = copy.copy(args)
        for name, value in change.settings.items():
            setattr(changed, name, value)
        batches = change.batches or make_batches(min(changed.per_device_train_batch_size, plan.num_rows))
        if changed.method == "align" != args.method:
            batches = [batch for batch in batches if has_images(batch)]  # of the others nothing would be learnt
        try:
            found = estimate_largest(change.config or config, changed, batches, device) if batches else plan
        except ValueError:  # it does not fit this model
            continue
        remedy = Remedy(change.how, change.price, found)
        if found.peak <= WORTH * plan.peak:
            num_found += 1
            yield remedy
        elif found.peak < plan.peak:
            small.append(remedy)
    small.sort(key=lambda remedy: remedy.plan.peak)
    yield from small[: max(NUM_NAMED - num_found, 0)]


def three_remedies(remedies: list[Remedy], capacity: float | None) -> list[Remedy]:
    """The three to name: those that fit first, else those that save most; in their own order.

    Args:
        remedies: as found.
        capacity: bytes of the device; None where it is not known.
    """
    fitting = [one for one in remedies if capacity is not None and one.plan.fits(capacity)]
    others = sorted((one for one in remedies if one not in fitting), key=lambda one: one.plan.peak)
    chosen = (fitting + others)[:NUM_NAMED]
    return [one for one in remedies if one in chosen]
