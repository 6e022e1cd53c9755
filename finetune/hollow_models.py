"""A model as a recipe trains it, without its weights: its tensors have shapes and dtypes and no numbers.

It is the real model, by its own code and PEFT's, so that nothing is known twice of what a recipe trains. Its tensors
are torch's `FakeTensor`s, which say that they are on a CPU; small tensors of numbers (token ids, sizes of images) go
in as they are.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import moe

from modeling_vlmoe import VLMoEConfig
from modeling_vlmoe.conversion.host_parents import host_values, is_host
from modeling_vlmoe.conversion.meta_models import build_vlm
from modeling_vlmoe.hollow_tensors import is_hollow, standing_for

from .adapters import check_lora, prepare_model
from .arguments import FinetuneArguments
from .checkpoints import load_base_config
from .gpus import Device


def load_any_config(args: FinetuneArguments) -> Any:
    """The configuration of a model to plan for: a vlmoe one, or a dense VLM of transformers', as if it had no experts.

    Raises:
        ValueError: if it is another.
    """
    config = load_base_config(args.model, **args.hub)
    if config.model_type == VLMoEConfig.model_type:
        return config
    if not is_host(config):
        raise ValueError(
            f"model {args.model} is a {config.model_type} model; expected a vlmoe one, or a VLM that `vlmoe upcycle "
            "--vlm-model` leaves in its own class. Make a vlmoe one of it first: vlmoe upcycle, with --dense for one "
            "without experts."
        )
    return VLMoEConfig.from_dict(host_values(config))


def model_dtype(config: Any, dtype: str) -> torch.dtype:
    """The dtype that a model is loaded in, as a recipe says it."""
    saved = config.dtype or torch.float32
    chosen = saved if dtype == "auto" else dtype
    return chosen if isinstance(chosen, torch.dtype) else getattr(torch, str(chosen).removeprefix("torch."))


def make_hollow(model: nn.Module, mode: FakeTensorMode) -> None:
    """Gives a meta model tensors without numbers that say they are on a CPU; what is tied stays tied."""
    made: dict[int, Any] = {}
    seen = []  # kept, so that no other tensor gets the id of one of them

    def hollow(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                new: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
            seen.append(tensor)
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = hollow(tensor)  # type: ignore[assignment]


def grouped_shape(left: Tensor, right: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    """The shape of torch's `grouped_mm` of these: one product per group, of rows or of what is summed over."""
    if left.ndim == right.ndim == 2:
        assert ends is not None
        return len(ends), left.shape[0], right.shape[1]
    if left.ndim == right.ndim:
        return len(left), left.shape[1], right.shape[2]
    return left.shape[-2], right.shape[-1]


class HollowOperations(TorchDispatchMode):
    """Within it tensors without numbers go through what they else would not (torch 2.13): they can be indexed by masks
    that have numbers, of which is looked up before which are true; and `grouped_mm` takes them in every dtype.
    """

    INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and is_hollow(args[0]):
            ends = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            return args[0].new_empty(grouped_shape(args[0], args[1], ends))
        if func in self.INDEXING and is_hollow(args[0]):
            indices: list[Tensor | None] = []
            for index in args[1]:
                is_mask = index is not None and index.dtype == torch.bool and not is_hollow(index)
                indices += index.nonzero().unbind(1) if is_mask else [index]
            args = (args[0], indices, *args[2:])
        return func(*args, **(kwargs or {}))


@contextmanager
def planned_for(device: Device) -> Iterator[None]:
    """Within it tensors without numbers go through the kernels of a device: ours by what they stand for, the host's
    `grouped_mm` by whether the device has torch's.
    """
    by_tensors = moe._can_use_grouped_mm

    def by_device(input: Tensor, weight: Tensor, offs: Tensor) -> bool:  # the host's names
        return not device.is_old if is_hollow(input) else by_tensors(input, weight, offs)

    moe._can_use_grouped_mm = by_device
    try:
        with standing_for(device.kind):
            yield
    finally:
        moe._can_use_grouped_mm = by_tensors


def build_hollow(config: Any, args: FinetuneArguments, mode: FakeTensorMode) -> tuple[nn.Module, set[str]]:
    """The model that a recipe trains, without numbers.

    Args:
        config: the model's.
        args: the recipe.
        mode: whose tensors it gets.

    Returns:
        The model, in training, and the names of what PEFT has added to it.
    """
    if args.method == "lora":
        check_lora(config, args)
    config = copy.deepcopy(config)
    dtype = model_dtype(config, args.dtype)
    model = build_vlm(config)
    model.tie_weights()
    if args.experts_implementation is not None:
        model.set_experts_implementation(args.experts_implementation)
    own = set()
    for parameter in model.parameters():
        own.add(id(parameter))
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT (0.21) asks transformers by a deprecated name
        prepared: nn.Module = prepare_model(model, args)
    added = {name for name, parameter in prepared.named_parameters() if id(parameter) not in own}
    make_hollow(prepared, mode)
    if args.activation_checkpointing:
        given: dict[str, Any] = dict(args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
        beside = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}  # as the Trainer
        prepared.activation_checkpointing_enable(activation_checkpointing_kwargs=given or None, **beside)  # type: ignore[operator]
    return prepared.train(), added
