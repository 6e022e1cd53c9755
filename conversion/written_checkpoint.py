"""What was written, opened as a user would open it: by its own configuration, weights and processor.

Names, shapes, dtypes and every byte outside the experts are checked against the mapping here; the experts, which are
most of the file, are proved by what they compute (`verify`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.sparse_moe import Experts

from .gaps import ProofError
from .meta_models import build_on_meta, fill_mapped, target_shapes
from .page_flow import PageFlow
from .planning import UpcyclePlan
from .seeding import tensor_generator
from .streaming import CheckpointReader, TensorSpec

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def check_weights(plan: UpcyclePlan, reader: CheckpointReader) -> None:
    """Checks the files against the mapping: what there is, and every byte of it but the experts'.

    Raises:
        ProofError: naming the tensor.
    """
    found = {name: TensorSpec(name, reader.dtype(name), reader.shape(name)) for name in reader.names}
    check_listed("The weights that were written", found, {spec.name: spec for spec in plan.mapping.specs})
    blocks = plan.mapping.blocks(plan.drawing)
    for assignment in plan.mapping.assignments:
        name = assignment.spec.name
        if assignment.operation != "experts" and not is_written(reader.tensor(name), blocks(name)):
            raise ProofError(
                f"{name} was not written as it was to be ({assignment.operation}). No checkpoint is written."
            )


def open_model(plan: UpcyclePlan, folder: Path, reader: CheckpointReader) -> PreTrainedModel:
    """The model that the written configuration describes, mapped from the files; experts run by the plain loop.

    Raises:
        ProofError: when it has other tensors than were written.
    """
    config = load_written(VLMoEConfig, folder, CONFIG_NAME)
    model = build_on_meta(lambda: VLMoEForConditionalGeneration(config))
    wanted = {spec.name: spec.shape for spec in plan.mapping.specs}
    check_listed("The model of the configuration that was written", target_shapes(model), wanted)
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation_internal = "eager"
    return fill_mapped(model, reader.tensor)


def expert_pages(plan: UpcyclePlan, reader: CheckpointReader, model: PreTrainedModel) -> PageFlow:
    """Lets go of each stack of experts when it has run: the model may be larger than the memory that is free."""
    pages = PageFlow()
    for path in plan.mlps:
        experts = model.get_submodule(f"{path}.experts")
        names = [f"{path}.experts.{name}" for name, _ in experts.named_parameters(recurse=False)]
        pages.let_go_after(experts, [reader.span(name) for name in names])
    return pages


def process_picture(plan: UpcyclePlan, folder: Path) -> tuple[Tensor, Tensor]:
    """What the written processor makes of a picture of noise: token ids, (1, sequence), and pixel values.

    Raises:
        ProofError: when it cannot be loaded, or gives pixel values of another shape than the parent's.
    """
    processor = load_written(VLMoEProcessor, folder, PROCESSOR_NAME)
    generator = tensor_generator(plan.drawing.seed, "proof picture")
    noise = torch.randint(256, (*plan.pixel_shape[-2:], 3), dtype=torch.uint8, generator=generator)
    inputs = processor(images=Image.fromarray(noise.numpy()), text=processor.image_token, return_tensors="pt")
    pixels = inputs["pixel_values"]
    if tuple(pixels.shape) != tuple(plan.pixel_shape):
        raise ProofError(
            f"The processor that was written makes {tuple(pixels.shape)} of a picture, its parent {plan.pixel_shape}."
        )
    return inputs["input_ids"], pixels
