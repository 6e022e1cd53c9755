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

from .image_inputs import blank_image
from .part_images import PartImages, no_text
from .router_losses import RouterContext
from .towers import tower_layers
from .visible_text import parts_reading_text


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
    """Zero, with the ViT and the connector in its graph; behind the text's embedding, where others encode images.

    Args:
        model: a `VLMoEModel`.

    Raises:
        ValueError: if the ViT's configuration does not say how large an image is.
    """
    image = blank_image(model.image_form, model.config.vision_config)
    image = {name: tensor.to(model.device) for name, tensor in image.items()}
    context = RouterContext(learns=False)
    for part in parts_reading_text(model.config):
        context.images[part] = PartImages(1, None, no_text(1, model.config.text_config.hidden_size, model.device))
    found = model.get_image_features(**image, router_context=context, return_dict=True)
    return 0.0 * torch.cat(list(found.pooler_output)).sum()
