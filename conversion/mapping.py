"""The total mapping from dense tensors to the sparse model's.

Every dense tensor is used once or dropped with a reason, every target is filled once.

It is data: a list of `Assignment`s, which is printed by `--dry-run`, written by the writer and counted in the receipt.

    model.language_model.layers.0.mlp.experts.gate_up_proj  <- experts x8 (gate_proj.weight, up_proj.weight)
    model.language_model.layers.0.mlp.router.weight         <- router, drawn
    model.language_model.norm.weight                        <- copy
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling_vlmoe.mlp_layouts import MLPLayout, find_activation, find_inner_norm, is_biased
from modeling_vlmoe.parts import find_connector, find_towers, word_embedding
from modeling_vlmoe.towers import find_dense_mlp

from .assignments import (
    DELTAS,
    EXPERTS,
    ROUTER,
    ROUTER_OPERATIONS,
    Assignment,
    DenseTensor,
    Drawing,
    TransposedTensor,
)
from .meta_models import target_shapes
from .operations import OPERATIONS
from .streaming import TensorSpec

PART_PREFIX = {"text": "model.language_model.", "vision": "model.vision_tower.", "connector": "model.connector."}


def is_one_memory(blocks: Iterator[Tensor], length: int, times: int) -> bool:
    """Whether blocks are the same `length` pieces of memory, given `times` times."""
    first = list(islice(blocks, length))  # held, so that no later block can be made in its place

    def place(block: Tensor) -> tuple:
        return block.data_ptr(), block.dtype, block.shape, block.stride()

    wanted = [place(block) for block in first] * (times - 1)
    return all(block is not None and place(block) == one for block, one in zip_longest(blocks, wanted))


@dataclass
class Mapping:
    """All assignments, in the order of the sparse model, and what is dropped.

    Attributes:
        assignments: One per target tensor.
        dropped: For each parent's role: its unused tensors and the reason.
    """

    assignments: list[Assignment]
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def specs(self) -> list[TensorSpec]:
        return [assignment.spec for assignment in self.assignments]

    @property
    def num_parameters(self) -> int:
        return sum(assignment.num_parameters for assignment in self.assignments)

    @property
    def num_active_parameters(self) -> int:
        return sum(assignment.num_active_parameters for assignment in self.assignments)

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for spec in self.specs)

    def blocks(self, drawing: Drawing) -> Callable[[str], Iterator[Tensor]]:
        """What the writer asks for the blocks of a target."""
        by_name = {assignment.spec.name: assignment for assignment in self.assignments}
        return lambda name: OPERATIONS[by_name[name].operation](by_name[name], drawing)

    def repeated(self, drawing: Drawing) -> set[str]:
        """The stacks of experts of which every expert is given as the same memory: to read one is to read all.

        A cast makes new memory, so cast stacks are not among them.
        """
        blocks = self.blocks(drawing)
        stacks = [assignment for assignment in self.assignments if assignment.operation == "experts"]
        return {
            one.spec.name for one in stacks if is_one_memory(blocks(one.spec.name), len(one.dense), one.num_experts)
        }


@dataclass(frozen=True)
class SparseMLP:
    """A dense MLP that becomes experts.

    Attributes:
        path: The experts' place in the model.
        layout: How it is written.
        is_biased: Whether its Linears have biases.
        num_experts: How many experts it becomes.
        num_active: How many of them a token uses.
        source: What its tensors' names begin with in the dense model; `path` where it is None.
        shared: The dense names of what all experts share (parameters of the activation, a norm), by theirs.
    """

    path: str
    layout: MLPLayout
    is_biased: bool
    num_experts: int
    num_active: int
    source: str | None = None
    shared: dict[str, str] = field(default_factory=dict, hash=False)

    def dense_names(self, parameter: str) -> tuple[str, ...]:
        """The dense tensors, inside the MLP, that make an expert's `parameter`."""
        return self.layout.expert_sources(self.is_biased)[parameter]

    def dense_tensor(self, dense_name: str, tensors: dict[str, DenseTensor]) -> DenseTensor:
        """One of the dense tensors that experts are made of, (rows, ...)."""
        stored = tensors[f"{self.path if self.source is None else self.source}.{dense_name}"]
        is_turned = self.layout.is_transposed and len(stored.shape) == 2
        return TransposedTensor(stored.source, stored.name) if is_turned else stored


def shared_names(mlp: nn.Module, layout: MLPLayout, experts: nn.Module) -> dict[str, str]:
    """Of what all experts share: the dense MLP's name of each tensor, by the experts' name."""
    dense = {
        "act_fn": find_activation(mlp, "the dense MLP", layout),
        "inner_norm": find_inner_norm(mlp),
    }
    modules = {module: name for name, module in mlp.named_modules()}
    names: dict[str, str] = {}
    for child, module in dense.items():
        if isinstance(module, nn.Module):
            shared = getattr(experts, child)
            names |= {f"{child}.{name}": f"{modules[module]}.{name}" for name in shared.state_dict()}
    return names


def sparse_mlps(dense: PreTrainedModel, sparse: PreTrainedModel) -> dict[str, SparseMLP]:
    """The MLPs that become sparse, by their path in the model.

    Args:
        dense: The dense model, which says how they are written.
        sparse: The sparse one, whose configuration says which they are.
    """
    found: dict[str, SparseMLP] = {}

    def add(path: str, layout: MLPLayout, mlp: nn.Module, moe, source: str) -> None:
        made: Any = sparse.get_submodule(f"{path}.experts")
        shared = shared_names(mlp, layout, made)
        experts = made.num_experts, moe.num_experts_per_tok
        found[path] = SparseMLP(path, layout, is_biased(mlp, layout), *experts, source, shared)

    for part, (where, tower) in find_towers(dense).items():
        if (moe := sparse.config.moe(part)) is not None:
            for index in moe.layers:
                mlp = find_dense_mlp(tower, index)
                add(f"{where}.{mlp.path}", mlp.layout, mlp.module, moe, f"{where}.{mlp.source}")
    if (moe := sparse.config.connector_moe) is not None:
        mlp = find_connector(dense)
        add(mlp.path, mlp.layout, mlp.module, moe, mlp.source)
    return found


def map_tensors(
    dense_tensors: dict[str, DenseTensor],
    mlps: dict[str, SparseMLP],
    sparse: PreTrainedModel,
    dtype: torch.dtype,
    dropped: dict[str, dict[str, str]],
) -> Mapping:
    """Assigns every dense tensor to a target and every target its dense tensors.

    Args:
        dense_tensors: The dense model's tensors, by their names in the dense vlmoe model.
        mlps: The MLPs that become experts.
        sparse: The sparse model on the meta device.
        dtype: What floating-point tensors are written in; routers stay float32.
        dropped: Carried into the result.

    Raises:
        ValueError: for a dense tensor that no target uses, or uses twice, and for a target that nothing fills.
    """
    shapes = target_shapes(sparse)
    growable = {f"{name}.weight" for name in vocabulary_modules(sparse)} | {
        f"{name}.bias" for name in vocabulary_modules(sparse)
    }
    mapping = Mapping([], dropped)
    used: dict[DenseTensor, str] = {}
    for name, shape in shapes.items():
        assignment = assign(name, shape, dense_tensors, mlps, dtype, name in growable)
        for dense in assignment.dense:
            if dense.stored in used:
                raise ValueError(f"{dense.name} would be used twice, for {used[dense.stored]} and for {name}.")
            used[dense.stored] = name
        mapping.assignments.append(assignment)
    if unused := [name for name, dense in dense_tensors.items() if dense not in used]:
        raise ValueError(f"The sparse model has no place for {len(unused)} dense tensors: {', '.join(unused[:5])}.")
    return mapping


def vocabulary_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that have one row per token: embedding and head."""
    wanted = (word_embedding(model), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is one for one in wanted)]


def assign(
    name: str,
    shape: tuple[int, ...],
    dense_tensors: dict[str, DenseTensor],
    mlps: dict[str, SparseMLP],
    dtype: torch.dtype,
    is_growable: bool,
) -> Assignment:
    """The assignment of one target.

    Raises:
        ValueError: when nothing fills it, or what would has another shape.
    """
    mark = next((mark for mark in (EXPERTS, ROUTER) if name.rpartition(mark)[0] in mlps), None)
    if mark == ROUTER:
        mlp, parameter = mlps[name.rpartition(mark)[0]], name.rpartition(mark)[2]
        operation = ROUTER_OPERATIONS.get(parameter, "router")
        return Assignment(TensorSpec(name, torch.float32, shape), operation, (), (), mlp.num_experts, mlp.num_active)
    if mark == EXPERTS:
        mlp, parameter = mlps[name.rpartition(mark)[0]], name.rpartition(mark)[2]
        if parameter in mlp.shared:
            shared = mlp.dense_tensor(mlp.shared[parameter], dense_tensors)
            return Assignment(TensorSpec(name, dtype, shape), "copy", (shared,))
        if parameter.endswith(("_a", "_b")) and parameter.startswith(DELTAS):
            operation = f"pair {parameter[-1]}"
            return Assignment(TensorSpec(name, dtype, shape), operation, (), (), mlp.num_experts, mlp.num_active)
        dense_names = mlp.dense_names(parameter.removeprefix(DELTAS))
        sources = tuple(mlp.dense_tensor(dense_name, dense_tensors) for dense_name in dense_names)
        rows, rest = sum(source.shape[0] for source in sources), sources[0].shape[1:]
        if shape == (rows, *rest):
            return Assignment(TensorSpec(name, dtype, shape), "base", sources, dense_names)
        if shape != (mlp.num_experts, rows, *rest):
            raise ValueError(
                f"{name} has the shape {shape}, but its dense MLPs make {(mlp.num_experts, rows, *rest)}."
            )
        return Assignment(
            TensorSpec(name, dtype, shape), "experts", sources, dense_names, mlp.num_experts, mlp.num_active
        )
    if name not in dense_tensors:
        raise ValueError(f"Nothing in the parents fills {name} of the sparse model.")
    dense = dense_tensors[name]
    spec = TensorSpec(name, dtype if dense.dtype.is_floating_point else dense.dtype, shape)
    if dense.shape == shape:
        return Assignment(spec, "copy", (dense,))
    if is_growable and dense.shape[1:] == shape[1:] and dense.shape[0] < shape[0]:
        return Assignment(spec, "grow", (dense,))
    raise ValueError(f"{name} has the shape {shape} in the sparse model, but {dense.shape} in its parent.")
