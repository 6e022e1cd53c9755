"""Which image each token of a ViT and of a connector is of, and which text is visible to that image.

Their layers see tokens in reading order of the images: one row per image, or all images in one row. Windows and the
like reorder the tokens of one image at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class VisibleText:
    """What a text gate reads: the words that images may know (see visible_text.py).

    Attributes:
        embeddings: (samples, sequence, text width), float32: the words, each divided by its root mean square.
        sample: (images,), which sample an image stands in.
        is_visible: (images, sequence), which words of its sample an image sees.
    """

    embeddings: Tensor
    sample: Tensor
    is_visible: Tensor


def no_text(num_images: int, width: int, device: torch.device) -> VisibleText:
    """What images see that stand in no text; it is in the graph as any other text is."""
    return VisibleText(
        embeddings=torch.zeros(1, 1, width, device=device),
        sample=torch.zeros(num_images, dtype=torch.long, device=device),
        is_visible=torch.zeros(num_images, 1, dtype=torch.bool, device=device),
    )


@dataclass
class PartImages:
    """The images whose tokens one part sees in one forward pass.

    Attributes:
        number: how many there are.
        counts: how many of the part's tokens each has; None where all have the same number.
        text: the text that they see; None where no router of the part reads it.
    """

    number: int
    counts: tuple[int, ...] | None = None
    text: VisibleText | None = None

    def of_token(self, num_tokens: int, device: torch.device) -> Tensor:
        """Which image each of the part's tokens is of, (tokens,), counted from 0.

        Raises:
            ValueError: if the tokens are not those of the images.
        """
        counts = self.counts
        if counts is None and self.number and num_tokens % self.number == 0:
            image = torch.arange(self.number, device=device)
            return image[:, None].expand(self.number, num_tokens // self.number).reshape(-1)
        if counts is None or sum(counts) != num_tokens:
            raise ValueError(
                f"{num_tokens} tokens are routed, but there are {self.number} images"
                f"{'' if counts is None else f' of {list(counts)} tokens'}, so it is not known which image a token is "
                'of. Choose another ViT, or router_type "softmax".'
            )
        number = torch.tensor(counts, device=device)
        return torch.arange(self.number, device=device).repeat_interleave(number, output_size=num_tokens)
