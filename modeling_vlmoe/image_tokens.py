"""Where images stand among an LLM's tokens."""

from typing import Any

import torch
from torch import Tensor

IMAGE_TOKENS = ("image_token_id", "image_token_index")
VIDEO_TOKENS = ("video_token_id", "video_token_index")


def image_token(config: Any) -> int | None:
    """The id of the placeholder that an image's features replace, by the names that configurations have for it."""
    return next((value for name in IMAGE_TOKENS if (value := getattr(config, name, None)) is not None), None)


def placeholder_tokens(config: Any) -> list[int]:
    """The ids that features of images and videos replace."""
    found = [getattr(config, name, None) for name in (*IMAGE_TOKENS, *VIDEO_TOKENS)]
    return [token for token in found if isinstance(token, int)]


@torch.no_grad()
def find_image_tokens(body: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor | None:
    """Where images and videos stand, (batch, sequence), told by their tokens or by these tokens' embeddings, as the
    model does; None where neither is known.
    """
    tokens = placeholder_tokens(body.config)
    if input_ids is not None:
        is_image = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in tokens:
            is_image = is_image | (input_ids == token)
        return is_image
    if inputs_embeds is None:
        return None
    is_image = torch.zeros(inputs_embeds.shape[:-1], dtype=torch.bool, device=inputs_embeds.device)
    for token in tokens:
        embedding = body.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        is_image = is_image | (inputs_embeds == embedding).all(-1)
    return is_image
