"""What a vision tower is given: pixels, packed patches with their grid, padded patches, frames.

A tower says it by the names of its forward's arguments. The first form whose names it has is its own.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe.image_inputs import patch_frames

from .tiny_configs import IMAGE_SIZE, PATCH_SIZE

SIDE = IMAGE_SIZE // PATCH_SIZE
NUM_FRAMES = 4
NUM_IMAGES = 2


@dataclass(frozen=True)
class CallForm:
    """A way to call a vision tower, or to give a whole VLM an image.

    Attributes:
        name: what tables call it.
        needed: arguments by which it is known.
        inputs: makes them, from the configuration.
    """

    name: str
    needed: frozenset[str]
    inputs: Callable[[Any], dict[str, Tensor]]


def noise(*shape: int) -> Tensor:
    """Random values of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def num_channels(config: Any) -> int:
    """How many channels an image has."""
    return getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3


def grid() -> Tensor:
    """The shape of one image in patches, (1, 3): frames, rows, columns."""
    return torch.tensor([[1, SIDE, SIDE]])


def flat_patches(config: Any) -> Tensor:
    """One image as rows of patches, (patches, frames x channels x height x width)."""
    return noise(SIDE * SIDE, patch_frames(config) * num_channels(config) * PATCH_SIZE**2)


def pixels(config: Any) -> dict[str, Tensor]:
    """Images, (images, channels, height, width)."""
    return {"pixel_values": noise(NUM_IMAGES, num_channels(config), IMAGE_SIZE, IMAGE_SIZE)}


def clip(config: Any) -> Tensor:
    """One video, (1, frames, channels, height, width)."""
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None) or NUM_FRAMES
    return noise(1, frames, num_channels(config), IMAGE_SIZE, IMAGE_SIZE)


def square_patches(config: Any) -> dict[str, Tensor]:
    """Patches as small images, (patches, channels, height, width), with their grid."""
    return {"pixel_values": noise(SIDE * SIDE, num_channels(config), PATCH_SIZE, PATCH_SIZE), "grid_thw": grid()}


def padded_patches(config: Any) -> dict[str, Tensor]:
    """NaFlex: patches of each image, padded, with a mask and the images' shapes in patches."""
    num = SIDE * SIDE
    return {
        "pixel_values": noise(NUM_IMAGES, num, num_channels(config) * PATCH_SIZE**2),
        "pixel_attention_mask": torch.ones(NUM_IMAGES, num, dtype=torch.long),
        "spatial_shapes": torch.tensor([[SIDE, SIDE]] * NUM_IMAGES),
    }


def placed_patches(config: Any) -> dict[str, Tensor]:
    """Patches of one image with each one's place."""
    places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="xy"), dim=-1)
    patches = noise(1, SIDE * SIDE, num_channels(config) * PATCH_SIZE**2)
    return {"pixel_values": patches, "pixel_position_ids": places.reshape(1, SIDE * SIDE, 2)}


def prompted_pixels(config: Any) -> dict[str, Tensor]:
    """An image with a prompt image and its mask (SegGPT)."""
    shape = (1, 3, IMAGE_SIZE // 2, IMAGE_SIZE)
    return {name: noise(*shape) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def patch_strip(config: Any) -> dict[str, Tensor]:
    """Patches of one image side by side, (1, channels, patch height, width), with the images' shapes in patches."""
    strip = noise(1, num_channels(config), PATCH_SIZE, SIDE * SIDE * PATCH_SIZE)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[SIDE, SIDE]], dtype=torch.int32)}


PIXELS = CallForm("pixels", frozenset({"pixel_values"}), pixels)
VIDEO = CallForm("video", frozenset({"pixel_values"}), lambda config: {"pixel_values": clip(config)})
SQUARES = CallForm("square patches", frozenset({"pixel_values", "grid_thw"}), square_patches)
# The first whose arguments a tower has; the plainest comes last.
FORMS = (
    CallForm(
        "packed patches",
        frozenset({"hidden_states", "grid_thw"}),
        lambda config: {"hidden_states": flat_patches(config), "grid_thw": grid()},
    ),
    CallForm(
        "packed patches, to be merged",
        frozenset({"pixel_values", "grid_thw", "merge_sizes"}),
        lambda config: {
            "pixel_values": flat_patches(config),
            "grid_thw": grid(),
            "merge_sizes": torch.tensor([1]),
        },
    ),
    CallForm(
        "packed patches",
        frozenset({"pixel_values", "grid_thw"}),
        lambda config: {"pixel_values": flat_patches(config), "grid_thw": grid()},
    ),
    CallForm(
        "square patches",
        frozenset({"pixel_values", "image_grid_thw"}),
        lambda config: {
            "pixel_values": noise(4, 2 * PATCH_SIZE, 2 * PATCH_SIZE, 3),
            "image_grid_thw": torch.tensor([[1, SIDE // 2, SIDE // 2]]),
        },
    ),
    CallForm("padded patches", frozenset({"pixel_values", "spatial_shapes"}), padded_patches),
    CallForm("placed patches", frozenset({"pixel_values", "pixel_position_ids"}), placed_patches),
    CallForm("a strip of patches", frozenset({"pixel_values", "target_sizes"}), patch_strip),
    CallForm("an image and a prompt", frozenset({"pixel_values", "prompt_pixel_values"}), prompted_pixels),
    CallForm("video", frozenset({"pixel_values_videos"}), lambda config: {"pixel_values_videos": clip(config)}),
    PIXELS,
)
# Towers whose arguments are named like another form's.
FAMILY_FORMS = {
    "kimi_k25_vision": SQUARES,
    "timesformer": VIDEO,
    "videomae": VIDEO,
    "vivit": VIDEO,
}


def find_form(
    family: str, model_class: Any, forms: Iterable[CallForm], exceptions: Mapping[str, CallForm]
) -> CallForm:
    """The form of a family: its exception, else the first whose arguments the forward of its class takes.

    Raises:
        ValueError: when there is none.
    """
    names = set(inspect.signature(model_class.forward).parameters)
    for form in (exceptions.get(family), *forms):
        if form is not None and form.needed <= names:
            return form
    raise ValueError(
        f"{model_class.__name__} takes {', '.join(sorted(names - {'self'}))}, and images in no known form; expected "
        f"the arguments of one of these: {'; '.join(form.name for form in forms)}."
    )


def call_form(family: str, model_class: Any) -> CallForm:
    """How the towers of a family are called.

    Raises:
        ValueError: when they are in no known way.
    """
    return find_form(family, model_class, FORMS, FAMILY_FORMS)
