"""What a whole VLM is given: an image, as raw tensors of the shapes that its processor makes, and a text around the
tokens that stand for it.

A VLM says how it takes an image by the names of its forward's arguments, as a ViT does (tower_inputs.py). The first
form whose names it has is its own.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.moe_config import part_config

from .findings import first_tokens
from .tiny_configs import IMAGE_SIZE, PATCH_SIZE
from .tiny_vlms import FINE_SIZE, IMAGE_TOKEN, NUM_TILES
from .tower_inputs import (
    SIDE,
    CallForm,
    clip,
    find_form,
    flat_patches,
    grid,
    noise,
    num_channels,
    padded_patches,
    patch_strip,
    pixels,
    placed_patches,
    square_patches,
)

NUM_WORDS = 4  # before the image, and as many after it
GETTERS = ("get_image_features", "get_video_features")  # the second is that of a VLM which reads frames alone
# What the ViT of a VLM calls an argument, and what the VLM does.
VLM_NAMES = {"grid_thw": "image_grid_thw", "pixel_position_ids": "image_position_ids"}
TOKEN_TYPES = "mm_token_type_ids"  # what forward calls the kinds of tokens, where positions depend on them


def renamed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's inputs by the names of a VLM."""
    return {VLM_NAMES.get(name, name): value for name, value in inputs.items()}


def packed_patches(config: Any) -> dict[str, Tensor]:
    """One image as rows of patches, (patches, values of a patch), with their grid."""
    return {"pixel_values": flat_patches(config), "image_grid_thw": grid()}


def tiles(config: Any, number: int = NUM_TILES) -> Tensor:
    """An image in tiles, (1, tiles, channels, height, width)."""
    return noise(1, number, num_channels(config), IMAGE_SIZE, IMAGE_SIZE)


def fine_pixels(config: Any) -> dict[str, Tensor]:
    """Images of two sizes, (images, channels, height, width) each."""
    small = pixels(config)
    number, channels, *_ = small["pixel_values"].shape
    return small | {"high_res_pixel_values": noise(number, channels, FINE_SIZE, FINE_SIZE)}


def ratio_tiles(config: Any) -> dict[str, Tensor]:
    """An image in as many tiles as there may be, (1, images, tiles, channels, height, width), with their places."""
    number = config.max_num_tiles
    return {
        "pixel_values": tiles(config, number).unsqueeze(1),
        "aspect_ratio_ids": torch.tensor([[config.max_aspect_ratio_id]]),
        "aspect_ratio_mask": torch.ones(1, 1, number, dtype=torch.long),
    }


def sized_tiles(config: Any) -> dict[str, Tensor]:
    """An image as a whole and in tiles side by side, (1, 1 + tiles, channels, height, width), with its size."""
    return {
        "pixel_values": tiles(config, 1 + NUM_TILES),
        "image_sizes": torch.tensor([[IMAGE_SIZE, NUM_TILES * IMAGE_SIZE]]),
    }


def sized_pixels(config: Any) -> dict[str, Tensor]:
    """Images, (images, channels, height, width), with their sizes."""
    images = pixels(config)
    return images | {"image_sizes": torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * len(images["pixel_values"]))}


def one_image(config: Any) -> dict[str, Tensor]:
    """One image, (1, channels, height, width)."""
    return {"pixel_values": pixels(config)["pixel_values"][:1]}


def question() -> dict[str, Tensor]:
    """What a Q-Former is asked beside the image, (1, words)."""
    return {"qformer_input_ids": first_tokens((1, NUM_WORDS))}


def pooled_patches(config: Any) -> dict[str, Tensor]:
    """One image as rows of patches, (1, patches, values of a patch), with the patches that each token is made of,
    (tokens, patches of a token), and how many rows and columns of tokens there are, (1, 4).
    """
    places = torch.arange(SIDE * SIDE).view(SIDE // 2, 2, SIDE // 2, 2).transpose(1, 2)
    return {
        "pixel_values": noise(1, SIDE * SIDE, num_channels(config) * PATCH_SIZE**2),
        "image_token_pooling": places.reshape(-1, 4),
        "image_grids": torch.tensor([[SIDE // 2, SIDE // 2, 0, 0]]),
    }


ONE = CallForm("pixels of one image", frozenset({"pixel_values"}), one_image)
FRAMES = CallForm(
    "frames and a question",
    frozenset({"pixel_values", "qformer_input_ids"}),
    lambda config: {"pixel_values": clip(config)} | question(),
)
SIZED = CallForm("pixels with their sizes", frozenset({"pixel_values", "image_sizes"}), sized_pixels)
SIZED_TILES = CallForm("tiles with the size", frozenset({"pixel_values", "image_sizes"}), sized_tiles)
SQUARES = CallForm(
    "square patches",
    frozenset({"pixel_values", "image_grid_thw"}),
    lambda config: renamed(square_patches(config)),
)
# The first whose arguments a VLM has; the plainest comes last.
IMAGE_FORMS = (
    CallForm(
        "packed patches, to be merged",
        frozenset({"pixel_values", "image_grid_thw", "image_merge_sizes"}),
        lambda config: packed_patches(config) | {"image_merge_sizes": torch.tensor([2])},
    ),
    CallForm("packed patches", frozenset({"pixel_values", "image_grid_thw"}), packed_patches),
    CallForm("padded patches", frozenset({"pixel_values", "spatial_shapes"}), padded_patches),
    CallForm(
        "placed patches",
        frozenset({"pixel_values", "image_position_ids"}),
        lambda config: renamed(placed_patches(config)),
    ),
    CallForm("a strip of patches", frozenset({"pixel_values", "target_sizes"}), patch_strip),
    CallForm(
        "rows of patches",
        frozenset({"image_patches"}),
        lambda config: {"pixel_values": noise(1, SIDE * SIDE, num_channels(config) * PATCH_SIZE**2)},
    ),
    CallForm("tiles with the aspect ratio", frozenset({"pixel_values", "aspect_ratio_ids"}), ratio_tiles),
    CallForm(
        "tiles with their mask",
        frozenset({"pixel_values", "tile_fine_mask"}),
        lambda config: {
            "pixel_values": tiles(config),
            "pixel_attention_mask": torch.ones(1, NUM_TILES, dtype=torch.bool),
        },
    ),
    CallForm(
        "tiles",
        frozenset({"pixel_values", "pixel_attention_mask"}),
        lambda config: {"pixel_values": tiles(config)},
    ),
    CallForm("pixels of two sizes", frozenset({"pixel_values", "high_res_pixel_values"}), fine_pixels),
    CallForm(
        "pixels and a question",
        frozenset({"pixel_values", "qformer_input_ids"}),
        lambda config: one_image(config) | question(),
    ),
    CallForm("pooled patches", frozenset({"pixel_values", "image_token_pooling"}), pooled_patches),
    CallForm("pixels", frozenset({"pixel_values"}), pixels),
)
# VLMs whose arguments are named like another form's.
FAMILY_IMAGE_FORMS = {
    "blip": ONE,
    "emu3": SIZED,
    "florence2": ONE,
    "granite4_vision": SIZED_TILES,
    "instructblipvideo": FRAMES,
    "lighton_ocr": SIZED,
    "llava_next": SIZED_TILES,
    "llava_next_video": SIZED_TILES,
    "llava_onevision": SIZED_TILES,
    "mistral3": SIZED,
    "paddleocr_vl": SQUARES,
    "pp_formulanet": ONE,
    "t5gemma2": ONE,
    "vision-encoder-decoder": ONE,
}
# VLMs that answer to no text alone.
NEED_AN_IMAGE = (
    "blip",
    "blip-2",
    "instructblip",
    "instructblipvideo",
    "pp_formulanet",
    "vision-encoder-decoder",
)


def image_form(family: str, model_class: Any) -> CallForm:
    """How the VLMs of a family take an image.

    Raises:
        ValueError: when it is in no known form.
    """
    return find_form(family, model_class, IMAGE_FORMS, FAMILY_IMAGE_FORMS)


def features_of(outputs: Any) -> list[Tensor]:
    """The features of an image that take the places of its tokens, in one tensor or several."""
    if getattr(outputs, "pooler_output", None) is not None:
        features = outputs.pooler_output
    elif "deepstack_features" in outputs:  # Granite-4's: one set for each of several layers, all in the same places
        _, features = outputs.deepstack_features[0]
    else:
        features = outputs.last_hidden_state
    return [features] if isinstance(features, Tensor) else list(features)


def count_tokens(model: Any, image: dict[str, Tensor]) -> int:
    """How many tokens an image takes: as many as the model makes features of it, one where it hands none to the LLM's
    inputs (Mllama, whose layers attend to them).

    Raises:
        ValueError: when the features are not as wide as the LLM.
    """
    getters = (getattr(one, name, None) for one in (model, model.base_model) for name in GETTERS)
    getter = next((one for one in getters if one is not None), None)
    if getter is None:
        return 1
    pieces = features_of(getter(**image, return_dict=True))
    width = part_config(model.config, "text").hidden_size
    if unlike := {one.shape[-1] for one in pieces} - {width}:
        raise ValueError(
            f"the features of an image are {sorted(unlike)} wide, the LLM {width}: the configuration of this "
            f"{model.config.model_type} names a size by a name that is not known here"
        )
    return sum(one.numel() for one in pieces) // width


def words(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """A text as a VLM takes it: to its encoder, with words of the answer to its decoder where that is apart.

    Args:
        model: the VLM.
        tokens: ids, (batch, sequence).
    """
    known, given = inspect.signature(model.forward).parameters, {}
    if "input_ids" in known:
        given["input_ids"] = tokens
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = first_tokens((len(tokens), 2 * NUM_WORDS))
    return given


def image_and_text(model: Any, form: CallForm) -> dict[str, Tensor]:
    """An image and words before and after it, as a VLM's forward takes them.

    Args:
        model: a dense VLM.
        form: how it takes an image.

    Returns:
        The image's tensors, and the text as of `words`, (1, sequence).
    """
    vision = part_config(model.config, "vision")
    image = form.inputs(model.config if vision is None else vision)
    before, after = first_tokens((1, 2 * NUM_WORDS)).chunk(2, dim=1)
    tokens = torch.cat([before, torch.full((1, count_tokens(model, image)), IMAGE_TOKEN), after], dim=1)
    types = {TOKEN_TYPES: (tokens == IMAGE_TOKEN).long()}
    known = inspect.signature(model.forward).parameters
    return image | words(model, tokens) | {name: value for name, value in types.items() if name in known}
