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
    return list(dict.fromkeys(token for token in found if isinstance(token, int)))  # names may mean the same field


# What `mm_token_type_ids` says of a token of an image, and of a video.
IMAGE_TYPES = (1, 2)


def check_tells_images(config: Any) -> None:
    """Refuses a VLM of transformers whose image tokens cannot be told in its LLM, for routing that asks for them.

    Raises:
        ValueError: saying why they cannot.
    """
    moe, name = config.text_moe, getattr(config, "body_model_type", config.model_type)
    if moe.modality_routing == "shared":
        return
    why = None
    if config.is_encoder_decoder:
        why = "has an encoder, which reads its images: its LLM, the decoder, is given none"
    elif getattr(config.get_text_config(), "cross_attention_layers", None):
        why = "lets its LLM look at images by cross-attention: none of its tokens is of an image"
    elif not placeholder_tokens(config):
        why = f"names no token that stands for images ({', '.join((*IMAGE_TOKENS, *VIDEO_TOKENS))})"
    if why is not None:
        raise ValueError(
            f'text_moe.modality_routing is {moe.modality_routing!r}, but {name} {why}. Choose "shared" for it.'
        )


def _marked(marks: Tensor, shape: torch.Size) -> Tensor:
    """The tokens of images and videos by `mm_token_type_ids`, (batch, sequence), whose past may be longer."""
    if marks.ndim != 2 or marks.shape[0] != shape[0] or marks.shape[1] < shape[1]:
        raise ValueError(
            f"mm_token_type_ids has the shape {tuple(marks.shape)}, but inputs_embeds {tuple(shape)}; expected one "
            "type for each token."
        )
    own = marks[:, marks.shape[1] - shape[1] :]
    return (own == IMAGE_TYPES[0]) | (own == IMAGE_TYPES[1])


@torch.no_grad()
def find_image_tokens(
    body: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, marks: Tensor | None = None
) -> Tensor | None:
    """Where images and videos stand, (batch, sequence), told by their tokens or by these tokens' embeddings, as the
    model does; None where neither is known.

    Args:
        body: the model without a head.
        input_ids: (batch, sequence).
        inputs_embeds: (batch, sequence, width).
        marks: `mm_token_type_ids`, (batch, sequence), which say where features of images already are in
            `inputs_embeds`.
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
    return is_image if marks is None else is_image | _marked(marks, is_image.shape).to(is_image.device)


def require_image_tokens(
    body: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, marks: Tensor | None, has_images: bool
) -> Tensor | None:
    """As `find_image_tokens`, for routing that has to know.

    Args:
        body: as there; the same of `input_ids`, `inputs_embeds` and `marks`.
        has_images: whether this pass is given images, whose places are free in `inputs_embeds` then.

    Raises:
        ValueError: if embeddings may hold features of images that nobody tells of.
    """
    if input_ids is None and inputs_embeds is not None and marks is None and not has_images:
        raise ValueError(
            f"text_moe.modality_routing is {body.config.text_moe.modality_routing!r}, and inputs_embeds came without "
            "images and without mm_token_type_ids, so that nobody knows which of them are features of images. Give "
            "input_ids, or mm_token_type_ids: 1 for features of images, 0 for text."
        )
    return find_image_tokens(body, input_ids, inputs_embeds, marks)
