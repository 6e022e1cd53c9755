"""Batches without images, where processes hold the ViT's weights together.

Under FSDP and DeepSpeed ZeRO-3 every layer's weights are gathered by all processes when the layer runs. A process
whose batch is text alone would not run the ViT, and the others would wait for it, or take its next gathering for their
own. So it encodes one blank image, which adds zero to the text's embeddings: each process gathers, and reduces
gradients, as often as the others.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.integrations import is_deepspeed_zero3_enabled

from .towers import tower_layers


def is_gathered(model: Any) -> bool:
    """Whether the layers of the ViT are gathered one by one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    _, layers = tower_layers(model.vision_tower)
    return is_deepspeed_zero3_enabled() or any(
        isinstance(layer, (FSDPModule, FullyShardedDataParallel)) for layer in layers
    )


def needs_blank_image(model: Any, past_key_values: Any) -> bool:
    """Whether a batch without images has to run the ViT; not while tokens are decoded one by one, where none does."""
    if not is_gathered(model):
        return False
    return past_key_values is None or past_key_values.get_seq_length() == 0


def encode_nothing(model: Any) -> Tensor:
    """Zero, with the ViT and the connector in its graph; before the text is embedded, where others encode images.

    Args:
        model: a `VLMoEModel`.

    Raises:
        ValueError: if the ViT's configuration does not say how large an image is.
    """
    config = model.config.vision_config
    if (size := getattr(config, "image_size", None)) is None:
        raise ValueError(
            f"A batch has no images, and the weights of the {config.model_type} tower are sharded, but its "
            "configuration has no image_size: give every batch an image."
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, getattr(config, "num_channels", 3), height, width)
    pixels = torch.zeros(shape, dtype=model.vision_tower.dtype, device=model.device)
    return 0.0 * torch.cat(model.get_image_features(pixels, return_dict=True).pooler_output).sum()
