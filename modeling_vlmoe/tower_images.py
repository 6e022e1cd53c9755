"""Which image each token of a ViT is of, where its layers do not see one row for each image: read off what the ViT
itself is given, so that it is known in our composite and in any VLM of transformers alike.
"""

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor

from .expert_choice import chooses_tokens
from .image_inputs import find_form, tokens_in_tower
from .part_images import PartImages
from .router_losses import RouterContext


def tower_images(dense_class: Any, config: Any, given: dict[str, Any]) -> tuple[PartImages, Tensor | None] | None:
    """The images that a ViT is given, and which of their tokens are real, (images, tokens), where some are padding;
    None where each row of what its layers see is an image.

    Args:
        dense_class: the ViT's.
        config: its configuration.
        given: the arguments of its forward, by their names.

    Raises:
        ValueError: if sizes of images are missing.
    """
    form = find_form(dense_class)
    if form.sizes is None:
        return None
    found = {key: given.get(argument) for key, argument in form.arguments.items()}
    if (sizes := found[form.sizes]) is None:
        raise ValueError(
            f"{dense_class.__name__} was not given {form.arguments[form.sizes]}, so it is not known how many tokens "
            "each image has, among which its experts choose. Pass it."
        )
    mask = found.get("pixel_attention_mask") if form.is_padded else None
    return PartImages(len(sizes), tokens_in_tower(form, config, found)), None if mask is None else mask.bool()


def context_of_tower(
    tower: Any, context: RouterContext | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> RouterContext | None:
    """A tower's context; of a ViT whose experts choose tokens, with its images.

    Args:
        tower: the sparse tower.
        context: what it was handed.
        args: what its forward is given; the same of `kwargs`.
    """
    if tower.moe is None or not chooses_tokens(tower.moe) or (context is not None and context.own_images is not None):
        return context
    dense_class = tower._dense_class
    names = tuple(inspect.signature(dense_class.forward).parameters)[1:]
    found = tower_images(dense_class, tower.config, dict(zip(names, args, strict=False)) | kwargs)
    if found is None:
        return context
    context = RouterContext(learns=False) if context is None else context
    images, mask = found
    return replace(context, own_images=images, token_mask=context.token_mask if mask is None else mask)
