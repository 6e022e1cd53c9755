"""The text that is visible to an image: what a text gate may read, so that no answer ever leaks into an image.

It is the text of the turns up to and including the user turn that holds the image, less the assistant's turns before
it (MATHS 6). The processor marks in `mm_token_type_ids` what is such text; an image then sees

    the tokens of its sample marked 3, from the beginning to the first one marked 0 behind the image.

| mark | what it stands at |
|---|---|
| 0 | the assistant's turns (header, answer, end), completions, padding |
| 1 | placeholders of images |
| 3 | all other text: system and user turns, their headers |

The first 0 behind an image is the header of the answer that follows, so nothing that the assistant says reaches it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.utils import torch_compilable_check

from .image_tokens import find_image_tokens
from .part_images import PartImages, VisibleText
from .router_losses import RouterContext

VISIBLE_MARK = 3
ATTENTION = "attention"  # the router_type that has a text gate
IMAGE_PARTS = ("vision", "connector")


def parts_reading_text(config: Any) -> list[str]:
    """The parts whose routers have a text gate."""
    moes = {part: config.moe(part) for part in IMAGE_PARTS}
    return [part for part, moe in moes.items() if moe is not None and moe.router_type == ATTENTION]


def without_text_marks(mark: Tensor) -> Tensor:
    """`mm_token_type_ids` as the host's own code takes it, where every value but 0 stands for an image or a video."""
    return mark.masked_fill(mark == VISIBLE_MARK, 0)


def unit_words(embeddings: Tensor) -> Tensor:
    """Word embeddings, (..., width), each divided by its root mean square, in float32 and out of the graph.

    Families differ by orders of magnitude: Gemma's are multiplied by the square root of their width, others have a
    standard deviation of 0.02. The gate reads them, and does not train them.
    """
    words = embeddings.detach().float()
    return words * (words.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny).rsqrt()


def check_marks(mark: Tensor | None, is_image: Tensor, mask: Tensor | None, parts: list[str]) -> Tensor:
    """Refuses images that come without the mark. A prompt may have no text at all; text before an image that is
    marked as the assistant's, in a batch of which nothing is visible, has not been marked.

    Args:
        mark: `mm_token_type_ids`, (batch, sequence).
        is_image: where images stand, likewise.
        mask: which tokens are real, likewise; None where all are.
        parts: whose routers read text.

    Raises:
        ValueError: saying what to do.
    """
    said = (
        f'router_type of {" and ".join(f"{part}_moe" for part in parts)} is "attention", which reads the text that '
        "belongs to an image, but "
    )
    cure = (
        "with marks_visible_text set (processor_config.json), which marks that text by 3: no answer reaches an image."
    )
    if mark is None:
        raise ValueError(
            f"{said}mm_token_type_ids is not given. Pass all that the model's own processor returns, {cure}"
        )
    if mark.shape != is_image.shape:
        raise ValueError(
            f"{said}mm_token_type_ids has the shape {tuple(mark.shape)}, and the tokens {tuple(is_image.shape)}; "
            f"expected the same. Pass all that the model's own processor returns, {cure}"
        )
    is_unmarked = (mark == 0) & ~is_image
    if mask is not None and mask.shape == mark.shape:
        is_unmarked = is_unmarked & mask.bool()
    before_image = is_image.long().flip(1).cumsum(1).flip(1) > 0
    torch_compilable_check(
        (mark == VISIBLE_MARK).any() | ~(is_unmarked & before_image).any(),
        lambda: f"{said}mm_token_type_ids marks none. Use the model's own processor, {cure}",
    )
    return mark


def find_visible(
    mark: Tensor, is_image: Tensor, num_images: int, counts: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Which sample each image stands in, (images,), and which of its tokens it sees, (images, sequence).

    Images stand in reading order, each in as many placeholders as it has features.

    Args:
        mark: `mm_token_type_ids`, (batch, sequence).
        is_image: where placeholders stand, likewise.
        num_images: how many images there are.
        counts: how many features each has; None where all have the same number.
    """
    length, device = mark.shape[1], mark.device
    number = is_image.flatten().long().cumsum(0)
    if counts is None:
        stop = (torch.arange(num_images, device=device) + 1) * (number[-1] // num_images)
    else:
        stop = torch.tensor(counts, device=device).cumsum(0)
    # The flat place of each image's last placeholder; the model refuses numbers that do not fit.
    last = torch.searchsorted(number, stop).clamp(max=len(number) - 1)
    sample, column = last // length, last % length
    columns = torch.arange(length, device=device)
    own = mark[sample]
    is_closed = ((own == 0) & (columns > column[:, None])).long().cumsum(1) > 0
    return sample, (own == VISIBLE_MARK) & ~is_closed


def with_visible_text(
    body: Any,
    context: RouterContext | None,
    images: dict[str, PartImages],
    counts: tuple[int, ...] | None,
    mark: Tensor | None,
    attention_mask: Any,
    input_ids: Tensor | None,
    inputs_embeds: Tensor,
) -> RouterContext | None:
    """The context of a pass with images, with what the parts' text gates read.

    Args:
        body: the model without a head.
        context: of the pass; None where there was nothing to hand down.
        images: what each part sees of them.
        counts: how many placeholders each image has; None where all have the same number.
        mark: `mm_token_type_ids`, (batch, sequence).
        attention_mask: (batch, sequence), or None.
        input_ids: (batch, sequence), or None.
        inputs_embeds: (batch, sequence, text width): the words, and anything at the images' places.

    Raises:
        ValueError: if the text is not marked.
    """
    if body.ignores_text or not (parts := parts_reading_text(body.config)):
        return context
    context = RouterContext(learns=False) if context is None else context
    is_image = find_image_tokens(body, input_ids, inputs_embeds)
    assert is_image is not None
    mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
    mark = check_marks(mark, is_image, mask, parts).to(is_image.device)
    number = images[parts[0]].number
    text = VisibleText(unit_words(inputs_embeds), *find_visible(mark, is_image, number, counts))
    for part in parts:
        context.images[part] = PartImages(number, images[part].counts, text)
    return context
