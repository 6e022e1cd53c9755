"""Tiny dense VLMs of transformers as their Hub folders have them: every parameter redrawn wide, with the host's own
processor, real tokenizer and real image processor.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    is_torchvision_available,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from modeling_vlmoe import VLMoEProcessor
from modeling_vlmoe.conversion.host_processor_classes import VIDEO
from modeling_vlmoe.conversion.host_processors import without_videos
from tests import tiny

SIDE, PATCH = 32, 8  # of an image and of a patch, in pixels
WIDTH = tiny.TEXT_FIELDS["hidden_size"]
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SIGLIP = tiny.VISION_FIELDS | {"model_type": "siglip_vision_model", "image_size": SIDE}
QWEN_VISION = {"depth": 4, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
IDEFICS_TOKENS = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global": "<global-img>"}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


@dataclass(frozen=True)
class Host:
    """One family.

    Attributes:
        text: what its LLM's configuration needs beside the tiny fields.
        vision: its ViT's configuration.
        tokens: the special tokens that its tokenizer names.
        ids: the configuration's field for the id of each of these tokens.
        processor: its class.
        image_processor: its class, and its settings.
        settings: of the processor.
        root: what the whole's configuration needs.
        place: how an image is placed in a text.
        tiles: the image processor's keyword that switches tiling, where it has one.
        tiling: what makes it tile pictures that are this small.
        layers: how many layers of the ViT reach the LLM.
        has_connector: whether its connector is an MLP that is known.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    tokens: dict[str, str]
    ids: dict[str, str]
    processor: str
    image_processor: tuple[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    root: dict[str, Any] = field(default_factory=dict)
    place: str = "<image>"
    tiles: str | None = None
    tiling: dict[str, Any] = field(default_factory=dict)
    layers: int = 4
    has_connector: bool = True


IMAGE = {"image_token": "<image>"}
PIXTRAL = {"patch_size": PATCH, "spatial_merge_size": 2, "image_token": "[IMG]"}
QWEN_IDS = {
    "image_token_id": "image_token",
    "video_token_id": "video_token",
    "vision_start_token_id": "vision_start_token",
    "vision_end_token_id": "vision_end_token",
}
QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_IMAGES = (
    "Qwen2VLImageProcessorPil",
    {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 2304}},
)
SPLIT = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True}
TILES = {"size": SQUARE, "image_grid_pinpoints": PINPOINTS}


def idefics(text: str, processor: str = "Idefics3Processor") -> Host:
    """Idefics3 and SmolVLM, which have one form."""
    return Host(
        text={"model_type": text},
        vision=tiny.VISION_FIELDS | {"image_size": SIDE},
        tokens=IDEFICS_TOKENS,
        ids={"image_token_id": "image_token"},
        processor=processor,
        image_processor=("Idefics3ImageProcessorPil", SPLIT),
        settings={"image_seq_len": 4},
        root={"scale_factor": 2},
        tiles="do_image_splitting",
        has_connector=False,
    )


HOSTS = {
    "qwen2_vl": Host(
        text={"rope_parameters": MROPE},
        vision=QWEN_VISION | {"embed_dim": 24, "hidden_size": WIDTH, "mlp_ratio": 2},
        tokens=QWEN_TOKENS,
        ids=QWEN_IDS,
        processor="Qwen2VLProcessor",
        image_processor=QWEN_IMAGES,
        place=QWEN_PLACE,
    ),
    "qwen2_5_vl": Host(
        text={"rope_parameters": MROPE},
        vision=QWEN_VISION
        | {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": WIDTH}
        | {"window_size": 32, "fullatt_block_indexes": [1]},
        tokens=QWEN_TOKENS,
        ids=QWEN_IDS,
        processor="Qwen2_5_VLProcessor",
        image_processor=QWEN_IMAGES,
        place=QWEN_PLACE,
    ),
    "qwen3_vl": Host(
        text={"rope_parameters": MROPE, "head_dim": 8},
        vision=QWEN_VISION
        | {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": WIDTH}
        | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        tokens=QWEN_TOKENS,
        ids=QWEN_IDS,
        processor="Qwen3VLProcessor",
        image_processor=QWEN_IMAGES,
        place=QWEN_PLACE,
    ),
    "qwen3_5": Host(
        text={
            "rope_parameters": MROPE | {"partial_rotary_factor": 0.5},
            "head_dim": 16,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        vision=QWEN_VISION
        | {"hidden_size": 24, "intermediate_size": 40, "out_hidden_size": WIDTH, "num_position_embeddings": 16},
        tokens=QWEN_TOKENS,
        ids=QWEN_IDS,
        processor="Qwen3VLProcessor",
        image_processor=QWEN_IMAGES,
        place=QWEN_PLACE,
    ),
    "smolvlm": idefics("llama", "SmolVLMProcessor"),
    "idefics3": idefics("llama"),
    "llava_next": Host(
        text={"model_type": "mistral", "head_dim": 8},
        vision=SIGLIP | {"model_type": "clip_vision_model"},
        tokens=IMAGE,
        ids={"image_token_index": "image_token"},
        processor="LlavaNextProcessor",
        image_processor=("LlavaNextImageProcessorPil", TILES | {"crop_size": SQUARE, "size": {"shortest_edge": SIDE}}),
        settings={"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        root={"image_grid_pinpoints": PINPOINTS},
        layers=3,
    ),
    "llava_onevision": Host(
        text={"model_type": "qwen2"},
        vision=SIGLIP,
        tokens=IMAGE | {"video_token": "<video>"},
        ids={"image_token_index": "image_token", "video_token_index": "video_token"},
        processor="LlavaOnevisionProcessor",
        image_processor=("LlavaOnevisionImageProcessorPil", TILES),
        settings={"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"},
        root={"image_grid_pinpoints": PINPOINTS},
    ),
    "internvl": Host(
        text={"model_type": "qwen2"},
        vision=tiny.VISION_FIELDS | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        ids={"image_token_id": "context_image_token"},
        processor="InternVLProcessor",
        image_processor=(
            "GotOcr2ImageProcessorPil",
            {"size": SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4},
        ),
        settings={"image_seq_length": 4},
        place="<IMG_CONTEXT>",
        tiles="crop_to_patches",
    ),
    "gemma3": Host(
        text={
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision=SIGLIP,
        tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        ids={"image_token_index": "image_token", "boi_token_index": "boi_token", "eoi_token_index": "eoi_token"},
        processor="Gemma3Processor",
        image_processor=(
            "Gemma3ImageProcessorPil",
            {"size": SQUARE},
        ),
        settings={"image_seq_length": 4},
        root={"mm_tokens_per_image": 4},
        place="<start_of_image>",
        tiles="do_pan_and_scan",
        tiling={"pan_and_scan_min_crop_size": 8, "pan_and_scan_min_ratio_to_activate": 1.1},
        has_connector=False,
    ),
    "paligemma": Host(
        text={"model_type": "gemma", "head_dim": 8, "vocab_size": 1600},
        vision=SIGLIP | {"projection_dim": WIDTH},
        tokens=IMAGE,
        ids={"image_token_index": "image_token"},
        processor="PaliGemmaProcessor",
        image_processor=("SiglipImageProcessorPil", {"size": SQUARE, "image_seq_length": (SIDE // PATCH) ** 2}),
        root={"projection_dim": WIDTH, "hidden_size": WIDTH},
        has_connector=False,
    ),
    "mistral3": Host(
        text={"model_type": "mistral", "head_dim": 8},
        vision=SIGLIP | {"model_type": "pixtral", "head_dim": 12, "image_size": 2 * SIDE},
        tokens={"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        ids={"image_token_index": "image_token"},
        processor="PixtralProcessor" if is_torchvision_available() else "VLMoEProcessor",
        image_processor=("PixtralImageProcessorPil", {"patch_size": 2 * PATCH, "size": {"longest_edge": 2 * SIDE}}),
        settings=PIXTRAL if is_torchvision_available() else {},
        root={"spatial_merge_size": 2},
        place="[IMG]",
    ),
}


def tokenizer(host: Host) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the tokens that a family's processor looks for."""
    plain = tiny.tokenizer()
    named = {name: getattr(plain, name) for name in ("pad_token", "bos_token", "eos_token")}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, padding_side="left", extra_special_tokens=host.tokens, **named
    )
    if host.tokens is IDEFICS_TOKENS:
        places = [f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)]
        fast.add_tokens([*places, "<end_of_utterance>"], special_tokens=True)
    return fast


def processor_class(host: Host) -> Any:
    """The class of a host's own processor."""
    return VLMoEProcessor if host.processor == VLMoEProcessor.__name__ else getattr(transformers, host.processor)


def processor(family: str) -> Any:
    """The host's own processor; without its videos, which need torchvision."""
    host = HOSTS[family]
    name, settings = host.image_processor
    parts = [getattr(transformers, name)(**settings), tokenizer(host)]
    if host.processor == VLMoEProcessor.__name__:
        sizes = {"image_sizes_name": "image_sizes", "image_token_side": 2 * PATCH, "image_token": host.place}
        return VLMoEProcessor.from_parents(*parts, None, **sizes)
    made_class = processor_class(host)
    if VIDEO in made_class.get_attributes():
        if is_torchvision_available():
            parts.append(getattr(transformers, VIDEO_PROCESSOR_MAPPING_NAMES[family]["torchvision"])(**settings))
        else:
            made_class = without_videos(made_class)
    return made_class(*parts, chat_template=CHAT.replace("IMAGE", repr(host.place)), **host.settings)


def config(family: str, **root: Any) -> Any:
    """The host's configuration, tiny, with the ids of the tokens that its tokenizer names."""
    host, tokens = HOSTS[family], tokenizer(HOSTS[family])
    ids = {name: tokens.convert_tokens_to_ids(host.tokens[token]) for name, token in host.ids.items()}
    text = tiny.TEXT_FIELDS | host.text
    return AutoConfig.for_model(family, text_config=text, vision_config=dict(host.vision), **(host.root | ids | root))


def model(family: str, **root: Any) -> Any:
    """The dense VLM."""
    made = tiny.redraw(AutoModelForImageTextToText.from_config(config(family, **root))).eval()
    for module in made.modules():
        if isinstance(module, GemmaRMSNorm | Qwen3_5RMSNorm):  # they add one to their weight
            module.weight.data -= 1
    return made


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **root: Any) -> Path:
    """Writes a dense VLM with its processor, as a Hub folder has them."""
    model(family, **root).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    processor(family).save_pretrained(folder)
    return Path(folder)


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A picture of noise, of a width and a height."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator).numpy())


def inputs(made: Any, family: str, num_images: tuple[int, ...] = (1,), **options: Any) -> dict[str, Tensor]:
    """What a processor makes of texts with so many pictures each, of unlike sizes."""
    host = HOSTS[family]
    texts = [f"{host.place * count} what colour{' is the shape' * row}?" for row, count in enumerate(num_images)]
    sizes = [(48, 40), (70, 33), (32, 64)]
    pictures = [
        [picture(10 * row + index, sizes[(row + index) % 3]) for index in range(count)]
        for row, count in enumerate(num_images)
    ]
    return accepted(family, made(text=texts, images=pictures, padding=len(texts) > 1, return_tensors="pt", **options))


def accepted(family: str, made: Any) -> dict[str, Tensor]:
    """Of what a processor gives, what the model takes: PaliGemma's gives labels, ours types for Mistral-3."""
    idle = {"labels"} | ({"mm_token_type_ids"} if HOSTS[family].processor == VLMoEProcessor.__name__ else set())
    return {name: value for name, value in made.items() if name not in idle}
