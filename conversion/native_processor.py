"""The processor of an exported model: transformers' LlavaProcessor, with the vlmoe processor's tokens and pixels."""

import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaProcessor

from modeling_vlmoe import VLMoEProcessor

from .gaps import ProofError
from .parents import BROKEN

SHOWN = ((31, 17), (40, 64))  # sizes of pictures that the two processors are compared on


def build_llava_processor(ours: VLMoEProcessor, config: Any, pixel_shape: tuple[int, ...]) -> LlavaProcessor:
    """LlavaProcessor counts patches of the pixel values; what it adds to them is set so that the number is ours.

    Args:
        ours: The model's processor.
        config: The model's configuration.
        pixel_shape: Of one picture's pixel values, (1, channels, height, width).

    Raises:
        ValueError: when a patch is no square.
    """
    patch_size = config.vision_config.patch_size
    if not isinstance(patch_size, int):
        raise ValueError(
            f"vision_config.patch_size is {patch_size}, but LLaVA's processor knows square patches only. Export the "
            "LM alone: --to text."
        )
    height, width = pixel_shape[-2:]
    strategy = config.vision_feature_select_strategy
    num_patches = (height // patch_size) * (width // patch_size)
    image_processor = copy.deepcopy(ours.image_processor)
    image_processor.do_convert_rgb = True  # as ours does before it
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=native_tokenizer(ours),
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=ours.chat_template,
        image_token=ours.image_token,
        num_additional_image_tokens=ours.num_image_tokens - num_patches + (1 if strategy == "default" else 0),
    )


def native_tokenizer(ours: VLMoEProcessor) -> Any:
    """The model's tokenizer with the model's chat template, giving what a native model's `forward` takes."""
    tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.chat_template = ours.chat_template
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture of noise."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (*size, 3), dtype=torch.uint8, generator=generator).numpy())


def conversations() -> list[list[dict[str, Any]]]:
    """One without a picture, one with two."""
    pictures = [{"type": "image", "image": picture(size, seed)} for seed, size in enumerate(SHOWN)]
    question = {"type": "text", "text": "What is it? 图 <b> 1.5"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A red cat."}]}
    return [
        [{"role": "user", "content": [question]}, answer, {"role": "user", "content": [question]}],
        [{"role": "user", "content": [pictures[0], question]}, answer, {"role": "user", "content": [pictures[1]]}],
    ]


def tokenize(processor: Any, messages: list[dict[str, Any]]) -> Any:
    """A model's inputs, by a processor's chat template."""
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def check_processor(ours: VLMoEProcessor, folder: Path) -> None:
    """Compares the written processor with the vlmoe one: token ids and pixels, bit by bit.

    Raises:
        ProofError: saying what differs.
    """
    try:
        native: Any = AutoProcessor.from_pretrained(folder)
    except BROKEN as error:
        raise ProofError(f"The processor that was written cannot be loaded: {error}") from error
    if not isinstance(native, LlavaProcessor):
        raise ProofError(f"The processor that was written is a {type(native).__name__}, not a LlavaProcessor.")
    for messages in conversations():
        wanted, got = tokenize(ours, messages), tokenize(native, messages)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            one, other = wanted.get(name), got.get(name)
            if (one is None) != (other is None) or (isinstance(one, Tensor) and not torch.equal(one, other)):
                raise ProofError(
                    f"The LlavaProcessor that was written gives other {name} than the model's own processor. No "
                    "checkpoint is written."
                )
