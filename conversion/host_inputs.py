"""What the proofs of a host's VLM run it on: what the written processor makes of a picture of noise and a text, and
where it reads videos here, of a video and a text.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import PROCESSOR_NAME

from modeling_vlmoe.moe_config import part_config

from .gaps import ProofError
from .host_processor_classes import IMAGE, PROCESSOR_CLASS, VIDEO, named_class
from .host_processors import load_processor, process, process_video, processor_files
from .processors import SHOWN_SIZES
from .seeding import tensor_generator
from .streaming import read_json

Inputs = dict[str, Any]
NUM_FRAMES = 4
NUM_WORDS = 8  # of an answer
PICTURE, VIDEO_TEXT = "a picture and text", "a video and text"
NOT_MADE = "its processor makes nothing of a video of small frames"


def noise(seed: int, number: int) -> Image.Image:
    """A picture of noise."""
    width, height = SHOWN_SIZES[0]
    generator = tensor_generator(seed, f"proof of picture {number}")
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


def pictures(processor: Any, seed: int) -> list[Image.Image]:
    """A picture of noise, or for a processor of frames alone (InstructBLIP-Video's) some."""
    reads_frames_alone = {IMAGE, VIDEO} & set(processor.get_attributes()) == {VIDEO}
    return [noise(seed, number) for number in range(NUM_FRAMES if reads_frames_alone else 1)]


def answer(config: Any, seed: int) -> Inputs:
    """Words of an answer, (1, words), for a decoder behind an encoder: no processor makes any."""
    if not config.is_encoder_decoder:
        return {}
    size = part_config(config, "text").vocab_size
    generator = tensor_generator(seed, "proof of answer")
    return {"decoder_input_ids": torch.randint(size, (1, NUM_WORDS), generator=generator)}


def host_inputs(processor: Any, config: Any, given: str, seed: int) -> tuple[dict[str, Inputs], str | None]:
    """What a processor makes of a picture, and of a video; by what it is.

    Args:
        processor: The host's, as it was written.
        config: The sparse model's.
        given: What messages call the model.
        seed: Of the noise.

    Returns:
        The inputs, and why there is no video where the processor should read one; None else.

    Raises:
        ValueError: when it reads no picture.
    """
    words = answer(config, seed)
    found = {PICTURE: words | process(processor, pictures(processor, seed), given)}
    if not {IMAGE, VIDEO} <= set(processor.get_attributes()):
        return found, None
    if (video := process_video(processor, [noise(seed, number) for number in range(NUM_FRAMES)])) is None:
        return found, NOT_MADE
    return found | {VIDEO_TEXT: words | video}, None


def open_written(folder: Path, given: str, model_type: str | None) -> Any:
    """The processor that was written; see `load_processor`.

    Raises:
        ProofError: when it cannot be loaded.
    """
    try:
        return load_processor(folder, given, model_type)[0]
    except ValueError as error:
        raise ProofError(f"The processor that was written cannot be loaded: {error}") from error


def is_copied(file: Path, copied: Path, is_named: bool) -> bool:
    """Whether a file of a processor was copied as it is; where no file names its class, that may have been added."""
    if not copied.is_file():
        return False
    if is_named or file.name != PROCESSOR_NAME:
        return copied.read_bytes() == file.read_bytes()
    return {name: value for name, value in read_json(copied).items() if name != PROCESSOR_CLASS} == read_json(file)


def check_copied(source: Path, folder: Path) -> None:
    """Every file of a processor is beside what was written.

    Args:
        source: Where the processor comes from.
        folder: What was written.

    Raises:
        ProofError: naming the file that is missing, or another.
    """
    is_named = named_class(source) is not None
    for file in processor_files(source):
        name = file.relative_to(source)
        if not is_copied(file, folder / name, is_named):
            raise ProofError(f"{name} of the processor was not copied as it is. No checkpoint is written.")
