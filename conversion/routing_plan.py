"""The plan of a checkpoint whose LLM is routed otherwise by modality: which rows its routers keep, and whether the
result computes the same.

Experts keep their weights and their order. Where one router becomes two, both are the old one. Where two become one,
an expert keeps the row by which it has been chosen: an expert of images that of the image router, an expert of text
that of the text router (the other row was never used, and never learnt); an expert of both the mean of its two rows,
or where it is of one modality afterwards that modality's.
"""

import copy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.delta_experts import DeltaExperts
from modeling_vlmoe.modality_routing import MODALITIES, has_two_routers, is_pooled, open_to
from modeling_vlmoe.moe_config import MoEConfig
from modeling_vlmoe.parts import blocks_of

from .assignments import EXPERTS, ROUTER, Assignment, DenseTensor
from .delta_operations import all_equal
from .dense_tensors import DenseTensors
from .export_plan import check_is_vlmoe
from .mapping import Mapping
from .meta_models import target_shapes
from .parents import Parent
from .rewrite_plan import RewritePlan, complete_plan, expert_counts
from .routing_arguments import ConvertRoutingArguments
from .streaming import TensorSpec

KIND = "convert-routing"
WEIGHT, IMAGE_WEIGHT = "weight", "image_weight"
COPIES = "the experts of each layer are copies of one another, and their weights are renormalised"
SAME = "every token has the experts and the router that it had"
KEPT = {
    (False, False): "the router stays as it is",
    (True, True): "both routers stay as they are",
    (False, True): "both routers are the old one",
    (True, False): "an expert keeps its row of the router by which it was chosen, an expert of both the mean of two",
}


@dataclass(frozen=True)
class RoutingChange:
    """What becomes of an LLM's routing.

    Attributes:
        before: The checkpoint's `text_moe`.
        after: The written one's.
        why_exact: Why both compute the same; None where they need not.
    """

    before: Any
    after: Any
    why_exact: str | None

    @property
    def kept(self) -> str:
        """What the routers are made of, in words."""
        return KEPT[has_two_routers(self.before), has_two_routers(self.after)]

    def describe(self) -> dict[str, Any]:
        """It as JSON values."""
        return {
            "from": described(self.before),
            "to": described(self.after),
            "routers": self.kept,
            "why_exact": self.why_exact,
            "norm_topk_prob": self.after.norm_topk_prob,
        }


@dataclass(frozen=True)
class RouterRows(DenseTensor):
    """Some rows of a router, (rows, width)."""

    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *super().shape[1:]

    def read(self) -> Tensor:
        return super().read()[self.start : self.stop]


@dataclass(frozen=True)
class MeanRows(RouterRows):
    """The mean of the same rows of two routers."""

    other: str

    def read(self) -> Tensor:
        both = super().read(), self.source.tensor(self.other)[self.start : self.stop]
        return (both[0].float() + both[1].float()) / 2


def described(moe: Any) -> dict[str, Any]:
    """An LLM's routing as JSON values."""
    return {"modality_routing": moe.modality_routing, "modality_experts": moe.modality_experts}


def in_words(moe: Any) -> str:
    """An LLM's routing, for people."""
    return f"{moe.modality_routing}{f' {moe.modality_experts}' if is_pooled(moe) else ''}"


def converted_config(args: ConvertRoutingArguments, source: Parent) -> Any:
    """The configuration with the routing that was asked for.

    Raises:
        ValueError: where there is nothing to convert, or the pools are impossible.
    """
    if args.to is None:
        raise ValueError("Give --to, how the LLM is to be routed, for example --to intra_inter.")
    config: Any = copy.deepcopy(source.config)
    if config.text_moe is None:
        raise ValueError(f"The LLM of {source.given} is dense, so there is nothing to route. Give one with experts.")
    config.text_moe = {"modality_routing": args.to, "modality_experts": args.modality_experts}
    if described(config.text_moe) == described(source.config.text_moe):
        raise ValueError(f"{source.given} is routed so already ({in_words(config.text_moe)}). Use it as it is.")
    return config


def row_of(expert: int, before: Any, after: Any) -> str:
    """The router whose row an expert keeps, where two become one: "image", "text" or "both"."""
    found = [modality for modality in MODALITIES if expert in open_to(before, modality)]
    if len(found) == 1:
        return found[0]
    found = [modality for modality in MODALITIES if expert in open_to(after, modality)]
    return found[0] if len(found) == 1 else "both"


def joined(router: str, tensors: DenseTensors, before: Any, after: Any) -> tuple[DenseTensor, ...]:
    """The pieces of the one router that two become.

    Args:
        router: What its tensors' names begin with.
        tensors: The checkpoint's.
        before: The `text_moe` that has two.
        after: That which has one.
    """
    names = {"image": router + IMAGE_WEIGHT, "text": router + WEIGHT}
    pieces: list[DenseTensor] = []
    for kept, run in groupby(range(before.num_experts), lambda expert: row_of(expert, before, after)):
        experts = list(run)
        place = experts[0], experts[-1] + 1
        if kept == "both":
            pieces.append(MeanRows(tensors, names["text"], *place, names["image"]))
        else:
            pieces.append(RouterRows(tensors, names[kept], *place))
    return tuple(pieces)


def router_sources(router: str, tensors: DenseTensors, before: Any, after: Any) -> dict[str, tuple[DenseTensor, ...]]:
    """What fills each weight of a router, by its name in it; see `joined`."""
    if has_two_routers(before) and not has_two_routers(after):
        return {WEIGHT: joined(router, tensors, before, after)}
    sources: dict[str, tuple[DenseTensor, ...]] = {WEIGHT: (DenseTensor(tensors, router + WEIGHT),)}
    if has_two_routers(after):
        image = IMAGE_WEIGHT if has_two_routers(before) else WEIGHT
        sources[IMAGE_WEIGHT] = (DenseTensor(tensors, router + image),)
    return sources


def map_routing(tensors: DenseTensors, sparse: Any, before: Any) -> Mapping:
    """Assigns every target its sources.

    Args:
        tensors: The checkpoint's.
        sparse: The model that is written, on the meta device.
        before: The checkpoint's `text_moe`.
    """
    filled: dict[str, tuple[DenseTensor, ...]] = {}
    for path, _ in blocks_of(sparse, {"text"}):
        router = f"{path}{ROUTER}"
        sources = router_sources(router, tensors, before, sparse.config.text_moe)
        filled |= {router + name: pieces for name, pieces in sources.items()}
    mapping, counts, used = Mapping([]), expert_counts(sparse), set()
    for name, shape in target_shapes(sparse).items():
        pieces = filled.get(name, (DenseTensor(tensors, name),))
        own = counts[name.rpartition(EXPERTS)[0]] if EXPERTS in name else (1, 1)
        operation = "copy" if len(pieces) == 1 and pieces[0].shape == shape else "rows"
        spec = TensorSpec(name, pieces[0].dtype, shape)
        mapping.assignments.append(Assignment(spec, operation, pieces, (), *own))
        used |= {one.name for one in pieces} | {one.other for one in pieces if isinstance(one, MeanRows)}
    if unused := sorted(set(tensors.names) - used):
        assert all(name.endswith(f"{ROUTER}{IMAGE_WEIGHT}") for name in unused), unused
        mapping.dropped["vlm"] = dict.fromkeys(unused, "an image router of which no expert keeps a row")
    return mapping


def are_copies(tensors: DenseTensors, path: str, experts: Any) -> bool:
    """Whether a block's experts are copies of one another.

    Args:
        tensors: The checkpoint's.
        path: The block's.
        experts: Its experts, on the meta device.
    """
    is_delta = isinstance(experts, DeltaExperts)
    start = f"{path}{EXPERTS}{'deltas.' if is_delta else ''}"
    holder = experts.deltas if is_delta else experts
    stacks = {name: tensors.tensor(start + name) for name, _ in holder.named_parameters(recurse=False)}
    for name, stack in stacks.items():
        partner = f"{name[:-2]}_b"
        if is_delta and name.endswith(("_a", "_b")) and not stacks[partner].any():
            continue  # it adds nothing yet
        if not all_equal(stack):
            return False
    return True


def rows_by_modality(sources: dict[str, tuple[DenseTensor, ...]]) -> dict[str, Tensor]:
    """The router of image tokens and that of text tokens, (experts, width) each."""
    read = {name: torch.cat([piece.read().float() for piece in pieces]) for name, pieces in sources.items()}
    return {"image": read.get(IMAGE_WEIGHT, read[WEIGHT]), "text": read[WEIGHT]}


def are_routed_alike(tensors: DenseTensors, paths: list[str], before: Any, after: Any) -> bool:
    """Whether each token has the same experts and the same router before and after."""
    if any(open_to(before, modality) != open_to(after, modality) for modality in MODALITIES):
        return False
    for path in paths:
        was, now = (
            rows_by_modality(router_sources(f"{path}{ROUTER}", tensors, before, moe)) for moe in (before, after)
        )
        for modality in MODALITIES:
            rows = open_to(after, modality)
            if not torch.equal(was[modality][rows], now[modality][rows]):
                return False
    return True


def find_why_exact(tensors: DenseTensors, sparse: Any, before: Any) -> str | None:
    """Why the written model computes what the checkpoint computes; None where it need not."""
    after, blocks = sparse.config.text_moe, blocks_of(sparse, {"text"})
    if are_routed_alike(tensors, [path for path, _ in blocks], before, after):
        return SAME
    if after.norm_topk_prob and all(are_copies(tensors, path, block.experts) for path, block in blocks):
        return COPIES
    return None


def plan_routing(args: ConvertRoutingArguments, source: Parent) -> RewritePlan:
    """Decides everything; of the weights, routers and experts are compared.

    Raises:
        ValueError: for whatever the user can mend.
    """
    check_is_vlmoe(source.given, source.config)
    before = MoEConfig(**source.config.text_moe.to_dict()) if source.config.text_moe is not None else None
    config = converted_config(args, source)
    plan, sparse = complete_plan(KIND, source, config, lambda tensors, model: map_routing(tensors, model, before))
    plan.routing = RoutingChange(before, config.text_moe, find_why_exact(plan.tensors, sparse, before))
    return plan
