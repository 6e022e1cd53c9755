"""Routing in the LLM that knows image tokens from text tokens (MATHS 5): which experts are open to which.

Experts stand in the order: those of images, those of text, shared ones (`modality_experts`).

| `modality_routing` | routers | open to image tokens | open to text tokens | balance |
|---|---|---|---|---|
| "shared" | one | all | all | over all tokens |
| "per_modality_balance" | one | all | all | over the tokens of each modality (MoIIE, 2508.09779) |
| "intra_inter" | one for each | images' and shared | text's and shared | over the tokens of each (MoIIE) |
| "isolated" | one | images' | text's | over the tokens of each (VL-MoE, 2303.07226; ERNIE-4.5-VL) |
"""

from typing import Any

import torch
from torch import Tensor

MODALITIES = ("image", "text")
POOLED = ("intra_inter", "isolated")


def default_modality_experts(kind: str, num_experts: int) -> list[int]:
    """How many experts images, text and both have, where nobody has said."""
    if kind == "isolated":
        return [num_experts // 2, num_experts - num_experts // 2, 0]
    quarter = num_experts // 4
    return [quarter, quarter, num_experts - 2 * quarter]


def has_two_routers(moe: Any) -> bool:
    return moe.modality_routing == "intra_inter"


def is_pooled(moe: Any) -> bool:
    """Whether some experts are closed to some tokens, so that routing has to know which are of images."""
    return moe.modality_routing in POOLED


def num_open(moe: Any, modality: str) -> int:
    """How many experts are open to the tokens of "image" or "text"."""
    if not is_pooled(moe):
        return moe.num_experts
    own = moe.modality_experts[MODALITIES.index(modality)]
    return own + moe.modality_experts[2]


def open_experts(moe: Any, logits_TE: Tensor, is_image_T: Tensor | None) -> Tensor | None:
    """Which experts are open to which token, (T, E); None where all are.

    Args:
        moe: the part's `MoEConfig`.
        logits_TE: (T, E).
        is_image_T: which tokens are of images, (T,).

    Raises:
        ValueError: if that has to be known, and is not.
    """
    if not is_pooled(moe):
        return None
    if is_image_T is None:
        raise ValueError(
            f"modality_routing is {moe.modality_routing!r}, but the router was not told which tokens are of images. "
            "Call the whole vision-language model, not its language model alone."
        )
    of_images, of_text, _ = moe.modality_experts
    expert_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    closed_to_text = expert_E < of_images
    closed_to_images = (expert_E >= of_images) & (expert_E < of_images + of_text)
    return ~torch.where(is_image_T[:, None], closed_to_images, closed_to_text)


def check_modality_routing(part: str, moe: dict[str, Any]) -> None:
    """Checks the fields of modality-aware routing, and fills in the pools.

    Raises:
        ValueError: naming the field.
    """
    kind, given = moe["modality_routing"], moe["modality_experts"]
    if kind != "shared" and part != "text":
        raise ValueError(
            f"{part}_moe.modality_routing is {kind!r}, but a {part} part sees images alone; it is for the LLM "
            "(text_moe). Leave it out."
        )
    if kind not in POOLED:
        if given is not None:
            raise ValueError(
                f"{part}_moe.modality_experts is {given}, but modality_routing is {kind!r}, which opens every expert "
                f"to every token; leave it out, or set modality_routing to one of {', '.join(map(repr, POOLED))}."
            )
        return
    num_experts, picked = moe["num_experts"], moe["num_experts_per_tok"]
    pools = default_modality_experts(kind, num_experts) if given is None else given
    if len(pools) != 3 or min(pools) < 0 or sum(pools) != num_experts:
        raise ValueError(
            f"{part}_moe.modality_experts is {pools}; expected three numbers, the experts of images, of text and of "
            f"both, that add up to num_experts ({num_experts})."
        )
    if kind == "isolated" and pools[2]:
        raise ValueError(
            f'{part}_moe.modality_experts is {pools}, but with modality_routing "isolated" no expert is of both: set '
            'the third number to 0, or choose "intra_inter".'
        )
    if min(pools[0] + pools[2], pools[1] + pools[2]) < picked:
        raise ValueError(
            f"{part}_moe.modality_experts is {pools}, which leaves a token fewer experts than num_experts_per_tok "
            f"({picked}). Give images and text, with the shared ones, {picked} or more each."
        )
    moe["modality_experts"] = list(pools)
