"""What is found out about one family, and what all measurements have in common."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..gaps import LIMIT
from .table import REFUSED
from .tiny_configs import VOCABULARY

NUM_EXPERTS, NUM_TOKENS, FIRST_WORD = 4, 24, 5
MOST_LETTERS = 2000


@dataclass(frozen=True)
class Finding:
    """What was found out about one family.

    Attributes:
        family: its model type.
        part: "text", "vision" or "vlm".
        kind: one of `KINDS` (table.py).
        gap: of logits or features, in standard deviations of the dense result; of a VLM that takes no text without an
            image, that of its MLPs; None where it was not converted.
        layouts: how its MLPs are written.
        reads: what a vision tower reads, or in which form a VLM was given an image; empty where it was given none.
        whole: the gap inside a written vision-language model.
        reason: why it was not converted, or not measured; of a VLM that was, why parts of it stay dense, and what it
            was not given.
        floor: the dense VLM's own rounding, where the gap had to be judged by it.
        image_gap: of a VLM's logits of an image and text.
        image_floor: as `floor`, of that gap.
    """

    family: str
    part: str
    kind: str
    gap: float | None = None
    layouts: str = ""
    reads: str = ""
    whole: float | None = None
    reason: str = ""
    floor: float | None = None
    image_gap: float | None = None
    image_floor: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is not empty, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


def one_line(error: BaseException, folder: Path | None = None) -> str:
    """What an error says, without line ends and the paths of this machine."""
    said = " ".join(str(error).split()) or type(error).__name__
    said = said if folder is None else said.replace(f"{folder}/", "")
    return f"{said[:MOST_LETTERS]} ..." if len(said) > MOST_LETTERS else said


def judged(finding: Finding) -> Finding:
    """A finding whose gap is too large is no conversion."""
    largest = max(gap for gap in (finding.gap, finding.whole) if gap is not None)
    if largest <= LIMIT:
        return finding
    reason = f"differs by {largest:.2g} standard deviations, {LIMIT:.2g} are allowed"
    return replace(finding, kind=REFUSED, reason=reason)


def first_tokens(shape: tuple[int, int]) -> Tensor:
    """Random ids of words, (batch, sequence)."""
    return torch.randint(FIRST_WORD, VOCABULARY, shape, generator=torch.Generator().manual_seed(5))
