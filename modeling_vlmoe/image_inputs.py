"""How images are given to a ViT, and which of its features are whose: all images of one size, or each of its own.

A ViT that takes images of any size is told their sizes beside the pixels, by the names of its `forward`; each row of
`FORMS` is one way to do so, and a new way is a new row.

The one invariant: an image takes as many tokens as `count_tokens` makes of its size, in the processor, in the model
and in the proof of a conversion.

    >>> find_form(Qwen2_5_VisionTransformerPretrainedModel).sizes
    'image_grid_thw'
    >>> count_tokens([(1, 4, 6)], side=2)
    [6]
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .configuration_vlmoe import VLMoEConfig, feature_width
from .parts_config import feature_layers, merges_patches


def is_named(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is one argument, not what is left over."""
    return parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class ImageForm:
    """One way to give images to a ViT.

    Attributes:
        name: what messages call it.
        sizes: what image processors call the images' sizes, (images, 2 or 3), height and width last; None: all images
            have one size.
        arguments: the ViT's argument for each of the image processor's results beside `pixel_values`.
        side: the attribute of the vision configuration that says how many units of `sizes` a token is wide, where
            the ViT itself joins them; None: 1.
        is_merged: whether a token is wider than one unit only in a ViT that merges patches.
        is_padded: whether features are (images, most tokens, width), those of each image first; else they are those of
            all images in one row.
    """

    name: str
    sizes: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)
    side: str | None = None
    is_merged: bool = False
    is_padded: bool = False

    def token_side(self, vision_config: Any) -> int:
        """How many units of `sizes` a token is wide."""
        is_apart = self.is_merged and not merges_patches(vision_config)  # as LFM3-VL's, whose connector merges
        return 1 if self.side is None or is_apart else getattr(vision_config, self.side)

    def missing_arguments(self, tower_class: type) -> list[str]:
        """What the `forward` of a ViT must be given that is neither pixels nor of this form."""
        known = {"self", *PIXELS, *self.arguments.values()}
        parameters = inspect.signature(tower_class.forward).parameters.values()  # type: ignore[attr-defined]
        return [one.name for one in parameters if one.name not in known and one.default is one.empty and is_named(one)]


PIXELS = ("pixel_values", "hidden_states")  # what ViTs call the argument that the pixels are
CHANNELS = ("num_channels", "in_channels")  # what vision configurations call the number of an image's channels
FRAMES = ("temporal_patch_size", "patch_temporal")  # what they call the number of frames that a patch spans
ONE_SIZE = ImageForm("images of one size")
FORMS = (
    # Qwen2.5-VL and later: (patches of all images, values of a patch), sizes in patches, 2 x 2 of which are merged.
    ImageForm(
        "packed patches", "image_grid_thw", {"image_grid_thw": "grid_thw"}, side="spatial_merge_size", is_merged=True
    ),
    # SigLIP2 NaFlex: (images, most patches, values of a patch), sizes in patches.
    ImageForm(
        "padded patches",
        "spatial_shapes",
        {"spatial_shapes": "spatial_shapes", "pixel_attention_mask": "pixel_attention_mask"},
        is_padded=True,
    ),
    # Pixtral: (images, channels, largest height, largest width), sizes in pixels.
    ImageForm("padded images", "image_sizes", {"image_sizes": "image_sizes"}, side="patch_size"),
    ONE_SIZE,
)
# Every key, beside pixel_values, that some image processor returns and some ViT takes.
IMAGE_KEYS = tuple(key for form in FORMS for key in form.arguments)


def find_form(tower_class: type) -> ImageForm:
    """The first form whose arguments the `forward` of a ViT takes."""
    known = inspect.signature(tower_class.forward).parameters  # type: ignore[attr-defined]
    return next(form for form in FORMS if set(form.arguments.values()) <= set(known))


def form_of_sizes(sizes: str | None) -> ImageForm:
    """The form in which images' sizes have this name.

    Raises:
        ValueError: when there is none.
    """
    for form in FORMS:
        if form.sizes == sizes:
            return form
    known = ", ".join(repr(form.sizes) for form in FORMS)
    raise ValueError(f"No ViT takes images' sizes as {sizes!r}; expected one of {known}.")


def count_tokens(sizes: Iterable[Sequence[int]], side: int) -> list[int]:
    """How many tokens images of these sizes take.

    Args:
        sizes: per image, height and width last.
        side: how many units of it a token is wide.
    """
    counts = []
    for size in sizes.tolist() if isinstance(sizes, Tensor) else sizes:
        *others, height, width = map(int, size)
        counts.append(math.prod(others) * (height // side) * (width // side))
    return counts


def tokens_in_tower(form: ImageForm, vision_config: Any, given: Mapping[str, Any]) -> tuple[int, ...] | None:
    """How many tokens each image has inside the ViT; None where all have the same number.

    Args:
        form: the ViT's.
        vision_config: its configuration.
        given: the image processor's results.
    """
    if form.sizes is None or form.is_padded:
        return None
    side = 1 if form.is_merged else form.token_side(vision_config)  # patches are merged behind the layers
    return tuple(count_tokens(given[form.sizes], side))


def tokens_of_images(form: ImageForm, vision_config: Any, given: Mapping[str, Any]) -> tuple[int, ...] | None:
    """How many features each image has behind the ViT; None where all have the same number."""
    if form.sizes is None:
        return None
    return tuple(count_tokens(given[form.sizes], form.token_side(vision_config)))


def check_width(features: Tensor, config: VLMoEConfig) -> None:
    """Refuses hidden states whose last dimension is not the ViT's width.

    Raises:
        ValueError: naming both.
    """
    wanted = feature_width(config.vision_config)
    if features.shape[-1] % wanted:
        raise ValueError(
            f"The hidden states of the {config.vision_config.model_type} tower end in {features.shape[-1]}, but its "
            f"width is {wanted}: expected (images, tokens, width), or (images, rows, columns, width). Choose another "
            "ViT."
        )


def tower_arguments(form: ImageForm, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a ViT is given beside the pixels.

    Args:
        form: the ViT's.
        given: the image processor's results, by its names; what another ViT would take may be there as None.

    Raises:
        ValueError: naming what is missing, or not the ViT's.
    """
    present = {key for key in IMAGE_KEYS if given.get(key) is not None}
    if present != set(form.arguments):
        wanted = ", ".join(["pixel_values", *form.arguments])
        raise ValueError(
            f"The vision tower takes {form.name}: expected {wanted}; given: "
            f"{', '.join(['pixel_values', *sorted(present)])}. Use the model's own processor, and pass all it returns."
        )
    return {argument: given[key] for key, argument in form.arguments.items()}


def check_strategy(form: ImageForm, vision_config: Any, strategy: str | None) -> None:
    """Refuses to leave out tokens that a ViT does not put before its patches.

    Raises:
        ValueError: naming the ViT.
    """
    if form.sizes is not None and strategy == "default":
        raise ValueError(
            f'vision_feature_select_strategy is "default", but a {vision_config.model_type} takes images of any size '
            "and puts no token before their patches. Leave it out."
        )


def rows_of_patches(hidden_state: Tensor) -> Tensor:
    """A ViT's hidden state as (images, patches, width); SAM's is (images, rows, columns, width)."""
    return hidden_state.flatten(1, 2) if hidden_state.ndim == 4 else hidden_state


def read_features(
    outputs: Any,
    config: VLMoEConfig,
    form: ImageForm,
    given: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    strategy: str | None = None,
) -> tuple[Tensor, list[int]]:
    """What the connector reads of a ViT's outputs.

    Args:
        outputs: the ViT's.
        config: says which hidden states are read, and which tokens left out.
        form: the ViT's.
        given: the image processor's results.
        layers: read these hidden states, not the configuration's.
        strategy: leave out what this one does, not the configuration's.

    Returns:
        (images, tokens, width) for images of one size, else (1, tokens of all images, width); each image's number of
        tokens.

    Raises:
        ValueError: for layers or tokens that this ViT does not give.
    """
    layers = list(layers or feature_layers(config))
    strategy = strategy or config.vision_feature_select_strategy
    check_strategy(form, config.vision_config, strategy)
    if merges_patches(config.vision_config):
        if layers != [-1]:
            raise ValueError(
                f"vision_feature_layer is {layers}, but a {config.vision_config.model_type} is read behind its "
                "merger. Leave it out."
            )
        features = outputs.pooler_output
    else:
        features = torch.cat([rows_of_patches(outputs.hidden_states[layer]) for layer in layers], dim=-1)
    if form.sizes is None:
        features = features[:, config.vision_num_prefix_tokens if strategy == "default" else 0 :]
        check_width(features, config)
        return features, [features.shape[1]] * features.shape[0]
    counts = count_tokens(given[form.sizes], form.token_side(config.vision_config))
    if form.is_padded:
        features = torch.cat([image[:count] for image, count in zip(features, counts, strict=True)])
    features = features.reshape(1, -1, features.shape[-1])
    if features.shape[1] != sum(counts):
        raise ValueError(
            f"The vision tower gives {features.shape[1]} features of images of the sizes ({form.sizes}) "
            f"{given[form.sizes].tolist()}, which should have {sum(counts)}. Set the image processor's patch and "
            "merge sizes to those of the tower."
        )
    return features, counts


def patch_frames(vision_config: Any) -> int:
    """How many frames of a video one patch spans; an image is repeated so often."""
    return next((frames for name in FRAMES if (frames := getattr(vision_config, name, None))), 1)


def blank_image(form: ImageForm, vision_config: Any) -> dict[str, Tensor]:
    """The smallest image that a ViT takes, black, as its image processor would give it.

    Raises:
        ValueError: if the configuration does not say how large an image is.
    """
    channels: int = next((getattr(vision_config, name) for name in CHANNELS if hasattr(vision_config, name)), 3)
    if form.sizes is None:
        if (size := getattr(vision_config, "image_size", None)) is None:
            raise ValueError(
                f"A batch has no images, and the weights of the {vision_config.model_type} tower are sharded, but its "
                "configuration has no image_size: give every batch an image."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(1, channels, height, width)}
    patch, side = vision_config.patch_size, form.token_side(vision_config)
    if form.sizes == "image_sizes":
        return {"pixel_values": torch.zeros(1, channels, side, side), "image_sizes": torch.tensor([[side, side]])}
    values = channels * patch * patch * patch_frames(vision_config)
    if form.is_padded:
        return {
            "pixel_values": torch.zeros(1, 1, values),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.int32),
            "spatial_shapes": torch.ones(1, 2, dtype=torch.int64),
        }
    return {"pixel_values": torch.zeros(side * side, values), "image_grid_thw": torch.tensor([[1, side, side]])}
