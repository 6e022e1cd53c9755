"""What was written, opened as a user would open it: by its own configuration, weights and processor.

Names, shapes, dtypes and bytes are checked against the mapping here. That the mapping is right is proved by what the
model computes (`verify`).
"""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from modeling_vlmoe import VLMoEConfig, VLMoEProcessor
from modeling_vlmoe.image_inputs import IMAGE_KEYS
from modeling_vlmoe.sparse_moe import Experts

from .assignments import Drawing
from .gaps import ProofError
from .mapping import Mapping
from .meta_models import build_vlm, fill_mapped, in_float32, target_shapes
from .page_flow import PageFlow
from .plans import UpcyclePlan
from .processors import SHOWN_SIZES
from .seeding import tensor_generator
from .streaming import CheckpointReader, TensorSpec

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLED_ROWS = 4  # of each expert that repeats the first


def load_written(auto_class: Any, folder: Path, file: str) -> Any:
    """Loads a configuration or a processor from what was written.

    Raises:
        ProofError: when that fails.
    """
    if not (folder / file).is_file():  # the host takes defaults, or what another file says
        raise ProofError(f"{file} is missing beside the weights that were written. No checkpoint is written.")
    try:
        return auto_class.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ProofError(f"The {file} that was written cannot be loaded: {error}") from error


def check_listed(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares two listings of tensors.

    Raises:
        ProofError: naming what is missing, strange or different.
    """
    if differing := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        name = differing[0]
        more = f" (and {len(differing) - 1} others)" if len(differing) > 1 else ""
        raise ProofError(
            f"{what}: {name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'no such tensor')}{more}. "
            "No checkpoint is written."
        )


def is_written(stored: Tensor, blocks: Iterable[Tensor]) -> bool:
    """Whether a stored tensor is, bit by bit, what these blocks give one after the other."""
    integer = INTEGERS[stored.element_size()]
    stored, start = stored.reshape(-1).view(integer), 0
    for block in blocks:
        wanted = block.reshape(-1).view(integer)
        if not torch.equal(stored[start : start + len(wanted)], wanted):
            return False
        start += len(wanted)
    return start == len(stored)


def is_repeated(reader: CheckpointReader, name: str, generator: torch.Generator) -> bool:
    """Whether each expert of a stack, (E, rows, ...), is the first one, by its first and last row and some between."""
    num_experts, num_rows, *rest = reader.shape(name)
    row_bytes = prod(rest) * reader.dtype(name).itemsize
    rows = {0, num_rows - 1, *torch.randint(num_rows, (SAMPLED_ROWS,), generator=generator).tolist()}

    def read(expert: int, row: int) -> bytes:
        return reader.raw(name, (expert * num_rows + row) * row_bytes, row_bytes)

    wanted = {row: read(0, row) for row in rows}
    return all(read(expert, row) == wanted[row] for expert in range(1, num_experts) for row in rows)


def check_weights(mapping: Mapping, drawing: Drawing, reader: CheckpointReader, repeated: set[str]) -> None:
    """Checks the files against the mapping: what there is, and its bytes.

    Args:
        mapping: What was to be written.
        drawing: What it was drawn with.
        reader: What was written.
        repeated: Stacks that hold one expert again and again, of which some rows are compared and no more; the first
            expert is to be proved by what it computes.

    Raises:
        ProofError: naming the tensor.
    """
    found = {name: TensorSpec(name, reader.dtype(name), reader.shape(name)) for name in reader.names}
    check_listed("The weights that were written", found, {spec.name: spec for spec in mapping.specs})
    blocks = mapping.blocks(drawing)
    for assignment in mapping.assignments:
        name = assignment.spec.name
        generator = tensor_generator(drawing.seed, f"rows of {name}")
        if not (
            is_repeated(reader, name, generator) if name in repeated else is_written(reader.tensor(name), blocks(name))
        ):
            raise ProofError(
                f"{name} was not written as it was to be ({assignment.operation}). No checkpoint is written."
            )


def open_model(plan: UpcyclePlan, folder: Path, reader: CheckpointReader, repeated: set[str]) -> PreTrainedModel:
    """The model that the written configuration describes, mapped from the files; experts run by the plain loop.

    Args:
        plan: What was to be written.
        folder: What was written.
        reader: Its weights.
        repeated: Stacks of which the first expert is read for all.

    Raises:
        ProofError: when it has other tensors than were written.
    """
    config = load_written(VLMoEConfig, folder, CONFIG_NAME)
    model = build_vlm(in_float32(config))
    wanted = {spec.name: spec.shape for spec in plan.mapping.specs}
    check_listed("The model of the configuration that was written", target_shapes(model), wanted)
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation_internal = "eager"

    def stored(name: str) -> Tensor:
        tensor = reader.tensor(name)
        return tensor[:1].expand(tensor.shape) if name in repeated else tensor

    return fill_mapped(model, stored)


def expert_pages(plan: UpcyclePlan, reader: CheckpointReader, model: PreTrainedModel) -> PageFlow:
    """Lets go of each stack of experts when it has run: the model may be larger than the memory that is free."""
    pages = PageFlow()
    for path in plan.mlps:
        experts = model.get_submodule(f"{path}.experts")
        names = [f"{path}.experts.{name}" for name, _ in experts.named_parameters(recurse=False)]
        pages.let_go_after(experts, [reader.span(name) for name in names])
    return pages


def process_pictures(plan: UpcyclePlan, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """What the written processor makes of a picture of noise: token ids, (1, sequence), and what the ViT takes. Where
    each picture has its own size, of several.

    Raises:
        ProofError: when it cannot be loaded, or gives pixel values of another shape than the parent's.
    """
    processor = load_written(VLMoEProcessor, folder, PROCESSOR_NAME)
    generator = tensor_generator(plan.drawing.seed, "proof picture")
    sizes = [(height, width) for width, height in SHOWN_SIZES]
    if plan.processor.image_sizes_name is None:
        sizes = [(plan.pixel_shape[-2], plan.pixel_shape[-1])]
    noise = [torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    pictures = [Image.fromarray(one.numpy()) for one in noise]
    text = "\n".join([processor.image_token] * len(pictures))
    try:
        inputs = processor(images=pictures, text=text, return_tensors="pt")
    except (LookupError, TypeError, ValueError) as error:
        raise ProofError(f"The processor that was written cannot read a picture: {error}") from error
    found = tuple(inputs["pixel_values"].shape)
    if found != tuple(plan.pixel_shape):
        raise ProofError(f"The processor that was written makes {found} of a picture, its parent {plan.pixel_shape}.")
    return inputs["input_ids"], {key: inputs[key] for key in ("pixel_values", *IMAGE_KEYS) if key in inputs}
