"""The plan of a checkpoint whose experts are held another way: delta experts as whole ones, or the reverse. Nothing is
written yet.

Every other tensor is copied, every source is used, every target is filled once.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from modeling_vlmoe import VLMoEProcessor
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.towers import sparse_blocks

from .assignments import DELTAS, EXPERTS, ROUTER, Assignment, DenseTensor, Drawing
from .delta_arguments import CompressArguments, DensifyArguments
from .dense_tensors import DenseTensors, find_dense_tensors
from .export_plan import check_is_vlmoe, dense_twin
from .host_planning import sub_configs
from .host_processor_classes import name_classes
from .host_processors import copy_processor, load_processor
from .mapping import Mapping
from .meta_models import build_vlm, target_shapes
from .parents import Parent
from .plans import DTYPES, load_generation
from .processors import load_part, measure_image
from .streaming import TensorSpec

CLAIM = "The model with whole experts is not the model with delta experts"
# What a stack of whole experts becomes, by what follows its name.
BEST = {"": "common", "_a": "best a", "_b": "best b"}


@dataclass
class RewritePlan:
    """Everything that is decided before the first byte is written.

    Attributes:
        kind: "densify", "compress" or "convert-routing".
        source: The checkpoint.
        tensors: Its tensors.
        config: The written model's configuration.
        processor: The checkpoint's.
        pixel_shape: Shape of one image's `pixel_values`; a host's own matter where it is empty.
        generation: The checkpoint's own generation settings.
        mapping: What fills every target.
        drawing: The seed.
        rewritten: The paths of the blocks whose experts are held another way.
        routing: What becomes of the routing (a `routing_plan.RoutingChange`), where that is converted.
    """

    kind: str
    source: Parent
    tensors: DenseTensors
    config: Any
    processor: Any
    pixel_shape: tuple[int, ...]
    generation: GenerationConfig
    mapping: Mapping
    drawing: Drawing
    rewritten: list[str]
    routing: Any = None

    @property
    def is_exact(self) -> bool:
        """Whether the written model is to compute what the checkpoint computes."""
        return self.kind == "densify" if self.routing is None else self.routing.why_exact is not None

    @property
    def not_proved(self) -> str | None:
        """What neither model is run on, and why; None where there is no such thing."""
        return None

    @property
    def source_bytes(self) -> int:
        """How large the checkpoint's weights are."""
        names = self.tensors.names
        return sum(torch.Size(self.tensors.shape(name)).numel() * self.tensors.dtype(name).itemsize for name in names)

    def write_processor(self, folder: Path) -> None:
        """Writes the processor into the checkpoint."""
        self.processor.save_pretrained(folder)


@dataclass
class HostRewritePlan(RewritePlan):
    """A plan for a VLM that is sparse in place.

    Attributes:
        not_read: What the processor cannot read on this machine, and so is not run; None where it reads all.
    """

    not_read: str | None = None

    @property
    def not_proved(self) -> str | None:
        """Videos, where the processor cannot read them."""
        return self.not_read

    def write_processor(self, folder: Path) -> None:
        """The host's processor, untouched, but for the name of its class where its files do not have it."""
        copy_processor(self.source.folder, folder)
        name_classes(folder, self.processor, self.config.body_model_type)


def parts_of_type(config: Any, expert_type: str) -> list[str]:
    """The parts whose experts are of a type."""
    return [part for part in PARTS if (moe := config.moe(part)) is not None and moe.expert_type == expert_type]


def densified_config(args: DensifyArguments, source: Parent) -> Any:
    """The configuration with whole experts.

    Raises:
        ValueError: where there are no delta experts, or for an unknown dtype.
    """
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is not known; expected one of {', '.join(DTYPES)}.")
    config: Any = copy.deepcopy(source.config)
    parts = parts_of_type(config, "delta")
    if not parts:
        raise ValueError(f"{source.given} has no delta experts, so there is nothing to densify. Use it as it is.")
    for part in parts:
        values = {"expert_type": "full", "expert_rank": None, "train_expert_base": True}
        setattr(config, f"{part}_moe", values)
    return config


def compressed_config(args: CompressArguments, source: Parent) -> Any:
    """The configuration with delta experts.

    Raises:
        ValueError: where there are no whole experts, or no rank is given.
    """
    if args.rank is None:
        raise ValueError("Give --rank, the rank of each expert's pairs, for example --rank 16.")
    config: Any = copy.deepcopy(source.config)
    parts = parts_of_type(config, "full")
    if not parts:
        others = ", but delta experts, which are small already" if parts_of_type(config, "delta") else ""
        raise ValueError(f"{source.given} has no whole experts{others}: nothing to compress. Use it as it is.")
    for part in parts:
        setattr(config, f"{part}_moe", {"expert_type": "delta", "expert_rank": args.rank})
    return config


def target_sources(name: str, kind: str) -> tuple[str, tuple[str, ...]]:
    """What fills an expert's tensor of another form: the operation, and the checkpoint's names."""
    path, _, parameter = name.rpartition(EXPERTS)
    if kind == "densify":
        stack = f"{path}{EXPERTS}{DELTAS}{parameter}"
        if parameter.endswith("_bias"):
            return "copy", (stack,)
        return "sum", (name, f"{stack}_a", f"{stack}_b")
    parameter = parameter.removeprefix(DELTAS)
    if parameter.endswith("_bias"):
        return "copy", (f"{path}{EXPERTS}{parameter}",)
    suffix = parameter[-2:] if parameter.endswith(("_a", "_b")) else ""
    return BEST[suffix], (f"{path}{EXPERTS}{parameter.removesuffix(suffix)}",)


def map_rewritten(tensors: DenseTensors, sparse: Any, kind: str, dtype: torch.dtype | None) -> Mapping:
    """Assigns every target its sources.

    Args:
        tensors: The checkpoint's.
        sparse: The model that is written, on the meta device.
        kind: "densify" or "compress".
        dtype: What floating-point tensors but routers are written in; None leaves them as they are.
    """
    mapping, used, counts = Mapping([]), set(), expert_counts(sparse)
    for name, shape in target_shapes(sparse).items():
        operation: str = "copy"
        names: tuple[str, ...] = (name,)
        if name not in tensors.stored or tensors.shape(name) != shape:
            operation, names = target_sources(name, kind)
        used |= set(names)
        dense = tuple(DenseTensor(tensors, one) for one in names)
        stored = dense[0].dtype
        wanted = stored if dtype is None or ROUTER in name or not stored.is_floating_point else dtype
        own = counts[name.rpartition(EXPERTS)[0]] if EXPERTS in name else (1, 1)
        mapping.assignments.append(Assignment(TensorSpec(name, wanted, shape), operation, dense, (), *own))
    assert used == set(tensors.names), sorted(set(tensors.names) - used)
    return mapping


def expert_counts(sparse: Any) -> dict[str, tuple[int, int]]:
    """How many experts each sparse block has, and how many of them a token uses, by its path."""
    return {
        path: (block.experts.num_experts, block.router.moe.num_experts_per_tok)
        for path, block in sparse_blocks(sparse)
    }


def plan_rewrite(kind: str, args: DensifyArguments | CompressArguments, source: Parent) -> RewritePlan:
    """Decides everything, from headers and configurations alone.

    Raises:
        ValueError: for whatever the user can mend.
    """
    check_is_vlmoe(source.given, source.config)
    config: Any
    dtype: torch.dtype | None = None
    if isinstance(args, DensifyArguments):
        config, dtype = densified_config(args, source), DTYPES.get(args.dtype or "")
    else:
        config = compressed_config(args, source)
    return complete_plan(
        kind,
        source,
        config,
        lambda tensors, sparse: map_rewritten(tensors, sparse, kind, dtype),
        dtype,
        getattr(args, "seed", 0),
    )[0]


def complete_plan(
    kind: str,
    source: Parent,
    config: Any,
    map_all: Callable[[DenseTensors, Any], Mapping],
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[RewritePlan, Any]:
    """The plan of what a configuration describes, and the model that is written, on the meta device.

    Args:
        kind: The plan's.
        source: The checkpoint.
        config: The written model's configuration; changed so that it can be written.
        map_all: Gives the mapping, of the checkpoint's tensors and the model that is written.
        dtype: What is written; None leaves tensors as they are.
        seed: Of what is drawn.

    Raises:
        ValueError: for whatever the user can mend.
    """
    tensors = find_dense_tensors(source)
    for one in sub_configs(config):
        one._name_or_path = ""  # a path of this machine, which the host writes into config.json
        one.dtype = dtype or one.dtype
    sparse: Any = build_vlm(config)
    config.architectures = [type(sparse).__name__]
    mapping = map_all(tensors, sparse)
    written = [one for one in mapping.assignments if EXPERTS in one.spec.name and one.operation != "copy"]
    found: dict[str, Any] = {
        "kind": kind,
        "source": source,
        "tensors": tensors,
        "config": config,
        "generation": load_generation(source, config),
        "mapping": mapping,
        "drawing": Drawing("kept", "kept", seed),
        "rewritten": sorted({one.spec.name.partition(EXPERTS)[0] for one in written}),
    }
    if is_in_place(config):
        processor, not_read = load_processor(source.folder, source.given, config.body_model_type)
        return HostRewritePlan(processor=processor, pixel_shape=(), not_read=not_read, **found), sparse
    processor = load_part(VLMoEProcessor, source, "processor")
    pixel_shape = measure_image(processor.image_processor, dense_twin(config), source).pixel_shape
    return RewritePlan(processor=processor, pixel_shape=pixel_shape, **found), sparse
