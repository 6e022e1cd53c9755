"""The plan of a checkpoint whose experts are held another way: delta experts as whole ones, or the reverse. Nothing is
written yet.

Every other tensor is copied, every source is used, every target is filled once.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.moe_config import PARTS

from .delta_arguments import CompressArguments, DensifyArguments
from .dense_tensors import DenseTensors, find_dense_tensors
from .export_plan import check_is_vlmoe, dense_twin
from .mapping import DELTAS, EXPERTS, PART_PREFIX, ROUTER, Assignment, DenseTensor, Drawing, Mapping
from .meta_models import build_on_meta, target_shapes
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
        kind: "densify" or "compress".
        source: The checkpoint.
        tensors: Its tensors.
        config: The written model's configuration.
        processor: The checkpoint's.
        generation: The checkpoint's own generation settings.
        pixel_shape: Shape of one image's `pixel_values`.
        mapping: What fills every target.
        drawing: The seed.
        rewritten: The paths of the blocks whose experts are held another way.
    """

    kind: str
    source: Parent
    tensors: DenseTensors
    config: VLMoEConfig
    processor: VLMoEProcessor
    generation: GenerationConfig
    pixel_shape: tuple[int, ...]
    mapping: Mapping
    drawing: Drawing
    rewritten: list[str]

    @property
    def source_bytes(self) -> int:
        """How large the checkpoint's weights are."""
        names = self.tensors.names
        return sum(torch.Size(self.tensors.shape(name)).numel() * self.tensors.dtype(name).itemsize for name in names)


def parts_of_type(config: Any, expert_type: str) -> list[str]:
    """The parts whose experts are of a type."""
    return [part for part in PARTS if (moe := config.moe(part)) is not None and moe.expert_type == expert_type]


def densified_config(args: DensifyArguments, source: Parent) -> VLMoEConfig:
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


def compressed_config(args: CompressArguments, source: Parent) -> VLMoEConfig:
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

    Raises:
        ValueError: for a rank that is no compression.
    """
    mapping, used = Mapping([]), set()
    for name, shape in target_shapes(sparse).items():
        operation: str = "copy"
        names: tuple[str, ...] = (name,)
        if name not in tensors.stored or tensors.shape(name) != shape:
            operation, names = target_sources(name, kind)
        if operation.startswith("best") and (rank := shape[1 if operation.endswith("a") else 2]) > min(
            sides := tensors.shape(names[0])[1:]
        ):
            raise ValueError(
                f"--rank is {rank}, but {names[0]} is {sides[0]} x {sides[1]}: a rank above {min(sides)} adds "
                "nothing. Choose a smaller one."
            )
        used |= set(names)
        dense = tuple(DenseTensor(tensors, one) for one in names)
        stored = dense[0].dtype
        wanted = stored if dtype is None or ROUTER in name or not stored.is_floating_point else dtype
        counts = expert_counts(sparse.config, name)
        mapping.assignments.append(Assignment(TensorSpec(name, wanted, shape), operation, dense, (), *counts))
    assert used == set(tensors.names), sorted(set(tensors.names) - used)
    return mapping


def expert_counts(config: Any, name: str) -> tuple[int, int]:
    """How many experts the part of a tensor has, and how many a token uses."""
    part = next((part for part, prefix in PART_PREFIX.items() if name.startswith(prefix)), None)
    moe = None if part is None or EXPERTS not in name else config.moe(part)
    return (1, 1) if moe is None else (moe.num_experts, moe.num_experts_per_tok)


def plan_rewrite(kind: str, args: DensifyArguments | CompressArguments, source: Parent) -> RewritePlan:
    """Decides everything, from headers and configurations alone.

    Raises:
        ValueError: for whatever the user can mend.
    """
    check_is_vlmoe(source.given, source.config)
    if is_in_place(source.config):
        raise ValueError(
            f"vlmoe {kind} rewrites our composite; {source.given} is a {source.config.body_model_type} that is sparse "
            "in place. Give `vlmoe upcycle` its dense parent and the --expert-init that you want."
        )
    config: Any
    dtype: torch.dtype | None = None
    if isinstance(args, DensifyArguments):
        config, dtype = densified_config(args, source), DTYPES.get(args.dtype or "")
    else:
        config = compressed_config(args, source)
    tensors = find_dense_tensors(source)
    for one in (config, config.text_config, config.vision_config):
        one._name_or_path = ""  # a path of this machine, which the host writes into config.json
        one.dtype = dtype or one.dtype
    processor = load_part(VLMoEProcessor, source, "processor")
    sparse: Any = build_on_meta(lambda: VLMoEForConditionalGeneration(config))
    mapping = map_rewritten(tensors, sparse, kind, dtype)
    config.architectures = [VLMoEForConditionalGeneration.__name__]
    changed = {one.spec.name.partition(EXPERTS)[0] for one in mapping.assignments if one.operation not in ("copy",)}
    return RewritePlan(
        kind,
        source,
        tensors,
        config,
        processor,
        load_generation(source, config),
        measure_image(processor.image_processor, dense_twin(config), source).pixel_shape,
        mapping,
        Drawing("kept", "kept", getattr(args, "seed", 0)),
        sorted(changed),
    )
