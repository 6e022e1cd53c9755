"""Tiny sparse models and batches for them."""

import torch
from torch import Tensor

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from tests import tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
ALL_SPARSE = {"text_moe": EXPERTS, "vision_moe": EXPERTS, "connector_moe": EXPERTS}
IMAGE_TOKEN = 300
PAIRS = [(text, vision) for text in tiny.TEXT_FAMILIES for vision in tiny.VISION_FAMILIES]


def sparse_config(text: str = "llama", vision: str = "siglip", **fields) -> VLMoEConfig:
    parts = ALL_SPARSE | {"image_token_id": IMAGE_TOKEN} | fields
    return VLMoEConfig(text_config=tiny.text_config(text), vision_config=tiny.vision_config(vision), **parts)


def sparse_model(
    text: str = "llama", vision: str = "siglip", seed: int = 0, **fields
) -> VLMoEForConditionalGeneration:
    """All three parts sparse with unlike experts, every parameter redrawn."""
    return tiny.redraw(VLMoEForConditionalGeneration(sparse_config(text, vision, **fields)), seed).eval()


def processor(vision: str = "siglip", chat_template: str | None = tiny.CHATML) -> VLMoEProcessor:
    return VLMoEProcessor.from_parents(tiny.image_processor(vision), tiny.tokenizer(chat_template), tiny.NUM_PATCHES)


def tokens(num_images: int, num_text: int, seed: int = 0) -> Tensor:
    """One row of token ids, (sequence,): the images' placeholders between text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(6, 290, (num_text,), generator=generator)
    images = [torch.full((tiny.NUM_PATCHES,), IMAGE_TOKEN) for _ in range(num_images)]
    return torch.cat([text[:2], *images, text[2:]])


def pixels(num_images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator)


def batch(num_images: tuple[int, ...] = (1, 1), num_text: int = 7, padding_side: str = "left") -> dict[str, Tensor]:
    """A padded batch whose rows hold these numbers of images, with attention mask and pixels in reading order."""
    rows = [tokens(count, num_text + index, seed=index) for index, count in enumerate(num_images)]
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if padding_side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if total := sum(num_images):
        inputs["pixel_values"] = pixels(total)
    return inputs


def single(inputs: dict[str, Tensor], num_images: tuple[int, ...], row: int) -> dict[str, Tensor]:
    """One row of a batch alone, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {
        "input_ids": inputs["input_ids"][row, real][None],
        "attention_mask": inputs["attention_mask"][row, real][None],
    }
    if num_images[row]:
        first = sum(num_images[:row])
        alone["pixel_values"] = inputs["pixel_values"][first : first + num_images[row]]
    return alone


def gap(found: Tensor, wanted: Tensor) -> float:
    """max |difference| / std(wanted)."""
    return ((found - wanted).abs().max() / wanted.std()).item()
