"""The text gate in a host's VLM that is sparse in place: which image the rows of its inputs are, what it may read, and
what the host's own code is given in the place of our marks.

A host may cut an image into tiles and place them between tokens of its own, in ways that only it knows. So an image
here is a row of `pixel_values`, or of the sizes beside it, whose features take the place of the next placeholders in
the text; a model whose rows are not told apart so is refused.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.utils import torch_compilable_check

from .image_inputs import ImageForm, count_tokens, find_form
from .image_tokens import find_image_tokens
from .moe_config import part_config
from .part_images import PartImages
from .parts import MERGES, vision_root, word_embedding
from .router_losses import RouterContext
from .visible_text import parts_reading_text, with_visible_text, without_text_marks

MARKS, PIXELS, VIDEO_PIXELS = "mm_token_type_ids", "pixel_values", "pixel_values_videos"


def refusal(body: Any, why: str) -> str:
    """What is said of a model of which it is not known which text belongs to an image."""
    parts = " and ".join(f"{part}_moe" for part in parts_reading_text(body.config))
    return (
        f'router_type of {parts} is "attention", which has to know the text that belongs to an image, but {why} '
        f"({type(body).__name__.removeprefix('Sparse')})."
    )


def check_known(model: Any) -> None:
    """Refuses, when it is built, a model of which it cannot be known which text belongs to an image; notes on it how
    its ViT is given images.

    Args:
        model: the host's, dense yet.

    Raises:
        ValueError: saying why.
    """
    if not parts_reading_text(model.config):
        return
    if model.config.is_encoder_decoder:
        why = refusal(model, "its text goes through an encoder of its own")
        raise ValueError(f"{why} Choose another router_type.")
    if (vision := vision_root(model)) is None:
        raise ValueError(f"{refusal(model, 'no ViT is known in it')} Choose another router_type.")
    model.base_model.image_form = find_form(type(vision))


def find_counts(
    body: Any, form: ImageForm, given: Mapping[str, Any], is_image: Tensor
) -> tuple[int, tuple[int, ...] | None, tuple[int, ...] | None]:
    """How many images there are; how many tokens each has in the ViT, and how many placeholders; None where alike.

    Args:
        body: the model without a head.
        form: how images are given to its ViT.
        given: the arguments of the host's forward, by name.
        is_image: where placeholders stand, (batch, sequence).

    Raises:
        ValueError: if that cannot be told.
    """
    if form.sizes is None or form.is_padded:
        pixels = given[PIXELS]
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            why = refusal(body, f"its pixel_values ({shape}) hold tiles, not one row for each image")
            raise ValueError(f"{why} Choose another router_type.")
        torch_compilable_check(
            (is_image.sum() % len(pixels) == 0) & is_image.any(),
            lambda: (
                f"{refusal(body, f'its {is_image.sum()} image tokens are not evenly those of {len(pixels)} images')} "
                "Choose another router_type."
            ),
        )
        return len(pixels), None, None
    if (sizes := given.get(form.sizes)) is None:
        raise ValueError(f"{refusal(body, f'{form.sizes} is not given')} Pass all that the processor returns.")
    vision, num_placeholders = part_config(body.config, "vision"), int(is_image.sum())
    unit = vision.patch_size if form.name == "padded images" else 1
    merges = {1, *(getattr(config, MERGES, 1) for config in (vision, body.config))}
    for merged in sorted(merges):
        counts = tuple(count_tokens(sizes, unit * merged))
        if sum(counts) == num_placeholders:
            return len(counts), tuple(count_tokens(sizes, unit)), counts
    said = f"images of {form.sizes} {sizes.tolist()} do not take its {num_placeholders} image tokens"
    raise ValueError(f"{refusal(body, said)} Choose another router_type.")


def context_of_host_images(
    body: Any,
    context: RouterContext | None,
    given: Mapping[str, Any],
    attention_mask: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> RouterContext | None:
    """A pass' context with what text gates read; as it is where there are none, or no images.

    Args:
        body: the model without a head.
        context: the pass'.
        given: the arguments of the host's forward, by name.
        attention_mask: (batch, sequence).
        input_ids: (batch, sequence), or `inputs_embeds`, (batch, sequence, width).

    Raises:
        ValueError: if it is not known which text belongs to an image.
    """
    if body.ignores_text or not parts_reading_text(body.config):
        return context
    if given.get(VIDEO_PIXELS) is not None:
        why = refusal(body, "a video is given, of whose frames that is not known")
        raise ValueError(f"{why} Give images, or choose another router_type.")
    if given.get(PIXELS) is None:
        return context
    is_image = find_image_tokens(body, input_ids, inputs_embeds)
    assert is_image is not None
    number, in_tower, counts = find_counts(body, body.image_form, given, is_image)
    if inputs_embeds is None:
        assert input_ids is not None
        inputs_embeds = word_embedding(body)(input_ids.masked_fill(is_image, 0))  # a placeholder may be no row of it
    images = {"vision": PartImages(number, in_tower), "connector": PartImages(number, counts)}
    return with_visible_text(body, context, images, counts, given.get(MARKS), attention_mask, input_ids, inputs_embeds)


def for_host(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a host's forward as its own code takes them, where a router reads text: it takes a mark that is
    not 0 for an image, or knows no marks.
    """
    if not (isinstance(mark := given.get(MARKS), Tensor) and parts_reading_text(model.config)):
        return given
    if model.takes_marks or model.base_model.takes_marks:
        return given | {MARKS: without_text_marks(mark)}
    return {name: value for name, value in given.items() if name != MARKS}
