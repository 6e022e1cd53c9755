"""Rows become batches: what the processor gives of image and text, and the class of each row."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data import Row

MOST_KEPT_BYTES = 2**28  # of all rows together


def move_images(pixels: Tensor, shift: float, turn: float) -> Tensor:
    """Each image moved and turned by a draw of its own; what comes into view is its rim.

    Args:
        pixels: (images, channels, height, width).
        shift: how far at most, as a share of a side.
        turn: how far at most, in degrees.
    """
    number = len(pixels)
    angle = (torch.rand(number) * 2 - 1) * torch.pi * turn / 180
    offset = (torch.rand(number, 2) * 2 - 1) * 2 * shift  # the grid's side is 2 long
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(number, 2, 2)
    grid = F.affine_grid(torch.cat([turned, offset[:, :, None]], dim=-1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


class RowReader:
    """Reads single rows as the processor gives them, and keeps those for which there is room.

    Args:
        processor: the model's.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        self.kept: dict[Row, dict[str, Tensor]] = {}
        self.room = MOST_KEPT_BYTES

    def __call__(self, row: Row) -> dict[str, Tensor]:
        """The processor's tensors of one row, each with a batch dimension of 1 (`pixel_values`: of the image)."""
        if row in self.kept:
            return self.kept[row]
        with Image.open(row.image) as image:
            content = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": row.text}]
        made: Any = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}]], tokenize=True, return_dict=True, return_tensors="pt"
        )
        read = dict(made)
        size = sum(value.nbytes for value in read.values())
        if size <= self.room:
            self.room -= size
            self.kept[row] = read
        return read


class ClassificationCollator:
    """Makes a batch of rows: the processor's inputs, padded on the right, and `labels`, (batch,).

    Args:
        reader: reads rows.
        labels: all classes.
        shift: see `move_images`; 0 for the test, as is `turn`.
        turn: see `move_images`.
    """

    def __init__(self, reader: RowReader, labels: Sequence[str], shift: float = 0.0, turn: float = 0.0):
        self.reader, self.shift, self.turn = reader, shift, turn
        self.index = {label: index for index, label in enumerate(labels)}
        self.padding = {"input_ids": reader.processor.tokenizer.pad_token_id}

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        read = [self.reader(row) for row in rows]
        batch = {"pixel_values": torch.cat([one["pixel_values"] for one in read])}
        for name in read[0]:
            if name not in batch:
                values = [one[name][0] for one in read]
                batch[name] = pad_sequence(values, batch_first=True, padding_value=self.padding.get(name, 0))
        if self.shift or self.turn:
            batch["pixel_values"] = move_images(batch["pixel_values"], self.shift, self.turn)
        return batch | {"labels": torch.tensor([self.index[row.label] for row in rows])}
