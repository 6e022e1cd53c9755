"""Models whose tensors have shapes and dtypes and no numbers (torch's `FakeTensor`s), and how they can be run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import moe

from modeling_vlmoe.hollow_tensors import is_hollow, standing_for

from .gpus import Device


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
