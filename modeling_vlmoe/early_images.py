"""Images that `generate` encodes before forward runs, so that beams and several returns share them, with what their
routers read of the text.

The host gives `get_image_features` what its signature names, and takes all of that out of the model's inputs, so the
text cannot come by those names; it comes inside a router context (transformers 5.23).
"""

from typing import Any

from torch import Tensor

from .image_inputs import IMAGE_KEYS


def given_words(inputs: Tensor, name: str | None, model_kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
    """The ids or the embeddings of the prompt, as `generate` has them.

    Args:
        inputs: its main input.
        name: which one that is.
        model_kwargs: the others.
    """
    if name == "inputs_embeds":
        return {"input_ids": None, "inputs_embeds": inputs}
    embeds = model_kwargs.get("inputs_embeds")
    return {"input_ids": None if embeds is not None else inputs, "inputs_embeds": embeds}


def put_context(model: Any, inputs: Tensor, model_kwargs: dict[str, Any], name: str | None) -> None:
    """Puts the context of the early encoding among the model's inputs, where images are encoded and a router reads
    text; the host takes it out again.

    Raises:
        ValueError: if that text is not marked.
    """
    if model_kwargs.get("pixel_values") is None or not model._supports_mm_encoder_outputs():
        return
    images = {key: model_kwargs.get(key) for key in ("pixel_values", *IMAGE_KEYS)}
    marks, mask = model_kwargs.get("mm_token_type_ids"), model_kwargs.get("attention_mask")
    words = given_words(inputs, name, model_kwargs)
    context = model.base_model.context_of_images(None, images, marks, mask, **words)
    if context is not None:
        model_kwargs["router_context"] = context
