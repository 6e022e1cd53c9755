"""Where an image's patches are among a layer's tokens.

What is known of a batch are the images as the ViT sees them: tiles of one size, or images of any size with their sizes
beside the pixels (`modeling_vlmoe.image_inputs`). From these and the number of a layer's tokens follows which of them
is which patch, for layers of the ViT (class tokens left out), the connector and the LLM. Where it does not follow,
there is no grid, and nothing is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import load_image

from modeling_vlmoe.image_inputs import find_form
from modeling_vlmoe.parts import connector_blocks, find_towers, vision_root
from modeling_vlmoe.towers import num_prefix_tokens

from ..host_chats import images_of
from ..router_load import Layer
from ..rows import conversation

# Of classes between a ViT and an LLM whose tokens are queries, none of which is a place in the image.
RESAMPLERS = ("resampler", "qformer", "perceiver")
MOST_JOINED = 4  # the most patches, in a row, that a token of the LLM may stand for
PACKED, PADDED_PATCHES, PADDED_IMAGES = "image_grid_thw", "spatial_shapes", "image_sizes"


# An image's tokens, row by row, and how many rows and columns these are.
Span = tuple[Tensor, tuple[int, int]]


@dataclass(frozen=True)
class Grid:
    """An image's tokens in a layer, as rows and columns.

    Attributes:
        tokens: indices into the layer's tokens, (rows x columns,), row by row.
        rows: how many.
        columns: how many.
    """

    tokens: Tensor
    rows: int
    columns: int


@dataclass(frozen=True)
class Picture:
    """An image, or a tile of one, as the ViT sees it.

    Attributes:
        row: the row of the batch that it belongs to.
        image: its pixels.
        size: height and width, in patches where the ViT is told these, else in pixels.
    """

    row: int
    image: Image.Image
    size: tuple[int, int]


def fit(number: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The rows and columns of so many patches on an image of this height and width; None where there are none."""
    height, width = size
    rows = round(math.sqrt(number * height / width))
    if rows < 1 or number % rows:
        return None
    columns = number // rows
    return (rows, columns) if abs(rows * width - columns * height) < max(height, width) else None


def unpadded(pixels: Tensor) -> list[Tensor]:
    """The tiles of a batch, (channels, height, width) each; tiles of zeros fill up where rows have unlike numbers."""
    if pixels.ndim == 5:
        return [tile for row in pixels for tile in row if tile.any()]
    return list(pixels)


def to_picture(tile_CHW: Tensor, image_processor: Any) -> Image.Image:
    """A tile as people see it: without the processor's normalisation."""
    tile = tile_CHW.detach().float().cpu()
    mean, std = (getattr(image_processor, name, None) for name in ("image_mean", "image_std"))
    if getattr(image_processor, "do_normalize", False) and mean is not None and std is not None:
        std_C, mean_C = (torch.tensor(values, dtype=tile.dtype) for values in (std, mean))
        tile = tile * std_C[:, None, None] + mean_C[:, None, None]
    if not getattr(image_processor, "do_rescale", True):
        tile = tile / 255
    array = (tile.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array if array.shape[2] == 3 else array[..., 0]))


def resamples(body: Any) -> bool:
    """Whether what the LLM gets of an image are queries, not patches (BLIP-2, Idefics2)."""
    return any(word in type(module).__name__.lower() for module in body.modules() for word in RESAMPLERS)


class ImagePlaces:
    """The images of one batch, and where their patches are.

    Args:
        body: the model's (see `router_load.find_body`).
        processor: the model's.
        rows: the batch's rows of chat data.
        batch: what the collator made of them.

    Attributes:
        pictures: the images in reading order, or their tiles; empty where they cannot be told apart.
        is_known: whether they can.
    """

    def __init__(self, body: Any, processor: Any, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]):
        self.body, self.processor, self.batch = body, processor, batch
        self.vision = vision_root(body)
        self.form = None if self.vision is None else find_form(type(self.vision))
        owners = [index for index, row in enumerate(rows) for _ in row.get("images") or []]
        self.pictures = self._pictures(rows, owners) if owners else []
        self.is_known = bool(self.pictures) or not owners

    def _pictures(self, rows: Sequence[Mapping[str, Any]], owners: list[int]) -> list[Picture]:
        name = None if self.form is None else self.form.sizes
        if name in (PACKED, PADDED_PATCHES):
            originals = [load_image(image) for row in rows for image in images_of(conversation(row))]
            sizes = [(int(size[-2]), int(size[-1])) for size in self.batch.get(name, ())]
            if len(originals) != len(sizes):
                return []
            return [Picture(*one) for one in zip(owners, originals, sizes, strict=True)]
        pixels = self.batch.get("pixel_values")
        if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
            return []
        tiles = unpadded(pixels)
        if len(tiles) != len(owners):
            if len(rows) > 1:
                return []
            owners = [0] * len(tiles)
        if name == PADDED_IMAGES:
            sizes = [(int(height), int(width)) for height, width in self.batch[name]]
            tiles = [tile[:, :height, :width] for tile, (height, width) in zip(tiles, sizes, strict=True)]
        images = [to_picture(tile, getattr(self.processor, "image_processor", None)) for tile in tiles]
        return [
            Picture(owner, image, (image.height, image.width)) for owner, image in zip(owners, images, strict=True)
        ]

    def spans(self, layer: Layer, num_tokens: int) -> list[Span] | None:
        """For each image its tokens among all image tokens of a layer, prefixes left out, and their rows and columns.

        Args:
            layer: the layer.
            num_tokens: all tokens of images that it routes.
        """
        if not self.pictures or (layer[0] != "vision" and resamples(self.body)):
            return None
        if self.form is not None and self.form.sizes is not None:
            return self._sized(layer, num_tokens)
        each, rest = divmod(num_tokens, len(self.pictures))
        if rest:
            return None
        prefix = num_prefix_tokens(find_towers(self.body)["vision"][1]) if self.vision is not None else 0
        found = []
        for index, picture in enumerate(self.pictures):
            for skipped in (0, prefix) if layer[0] == "text" else (prefix, 0):
                if (shape := fit(each - skipped, picture.size)) is not None:
                    found.append((torch.arange(index * each + skipped, (index + 1) * each), shape))
                    break
            else:
                return None
        return found

    def _sized(self, layer: Layer, num_tokens: int) -> list[Span] | None:
        """As `spans`, of images of any size."""
        assert self.form is not None
        patch = 1 if self.form.sizes != PADDED_IMAGES else self.vision_config.patch_size
        patches = [(picture.size[0] // patch, picture.size[1] // patch) for picture in self.pictures]
        if self.form.is_padded and layer[0] == "vision" and num_tokens % len(patches) == 0:
            each = num_tokens // len(patches)
            if each >= max(height * width for height, width in patches):
                return [
                    (torch.arange(index * each, index * each + height * width), (height, width))
                    for index, (height, width) in enumerate(patches)
                ]
        for side in range(1, MOST_JOINED + 1):
            shapes = [(math.ceil(height / side), math.ceil(width / side)) for height, width in patches]
            if sum(height * width for height, width in shapes) == num_tokens:
                return self._in_a_row(layer, shapes, side)
        return None

    def _in_a_row(self, layer: Layer, shapes: list[tuple[int, int]], side: int) -> list[Span]:
        """The tokens of images one behind the other, each as rows and columns."""
        order = torch.arange(sum(height * width for height, width in shapes))
        merge = getattr(self.vision_config, "spatial_merge_size", 1)
        if self.form is not None and self.form.sizes == PACKED and merge > 1:
            order = self._packed_order(layer, shapes, side, merge, order)
        found, first = [], 0
        for height, width in shapes:
            found.append((order[first : first + height * width], (height, width)))
            first += height * width
        return found

    def _packed_order(
        self, layer: Layer, shapes: list[tuple[int, int]], side: int, merge: int, order: Tensor
    ) -> Tensor:
        """For each patch, row by row, its place among packed ones: those that are merged lie together, and where the
        ViT attends in windows (Qwen2.5-VL) in the windows' order, also in a connector inside it.
        """
        tower = self.vision
        unit = merge**2 if side == 1 else 1
        is_windowed = hasattr(tower, "permute_input_for_window_attn") and layer[0] != "text"
        if is_windowed and layer[0] == "connector":
            inside = set(self.vision.modules()) if self.vision is not None else set()
            is_windowed = any(block in inside for block in connector_blocks(self.body))
        if is_windowed:
            from transformers.vision_utils import get_vision_window_index

            sizes = {name: getattr(tower, name) for name in ("window_size", "patch_size")}
            windows, _ = get_vision_window_index(self.batch[PACKED].cpu(), merge, **sizes)
            order = (torch.argsort(windows.cpu())[:, None] * unit + torch.arange(unit)).flatten()
        if side != 1:
            return order
        found, first = [], 0
        for height, width in shapes:
            blocks = order[first : first + height * width].view(height // merge, width // merge, merge, merge)
            found.append(blocks.transpose(1, 2).flatten())
            first += height * width
        return torch.cat(found)

    @property
    def vision_config(self) -> Any:
        return self.body.config.vision_config

    def grids(self, layer: Layer, num_tokens: int, image_tokens: Tensor | None = None) -> list[Grid | None]:
        """For each image its patches among a layer's tokens; None where that does not follow.

        Args:
            layer: the layer.
            num_tokens: the tokens that it routes.
            image_tokens: of the LLM, which of these are of images, indices.
        """
        number = num_tokens if image_tokens is None else len(image_tokens)
        spans = self.spans(layer, number)
        if spans is None:
            return [None] * len(self.pictures)
        places = torch.arange(num_tokens) if image_tokens is None else image_tokens
        return [Grid(places[tokens], *shape) for tokens, shape in spans]

    def owners(self, layer: Layer, num_tokens: int, num_rows: int) -> Tensor | None:
        """For each token of a layer of the ViT or the connector the row of the batch that it belongs to, (tokens,); -1
        for padding; None where it does not follow.
        """
        if num_rows == 1 and not (self.form is not None and self.form.is_padded):
            return torch.zeros(num_tokens, dtype=torch.long)
        spans = self.spans(layer, num_tokens)
        if spans is None:
            return torch.zeros(num_tokens, dtype=torch.long) if num_rows == 1 else None
        found = torch.full((num_tokens,), -1)
        each = num_tokens // max(len(self.pictures), 1)
        for index, (picture, (tokens, _)) in enumerate(zip(self.pictures, spans, strict=True)):
            if self.form is not None and self.form.sizes is None:  # class tokens are the image's too
                tokens = torch.arange(index * each, (index + 1) * each)
            found[tokens] = picture.row
        return found
