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
    return len(open_to(moe, modality))


def open_to(moe: Any, modality: str) -> list[int]:
    """The experts that are open to the tokens of "image" or "text", counted from 0."""
    experts = list(range(moe.num_experts))
    if not is_pooled(moe):
        return experts
    images, text, _ = moe.modality_experts
    return experts[:images] + experts[images + text :] if modality == "image" else experts[images:]


def image_flags(moe: Any, context: Any, x_TD: Tensor) -> Tensor | None:
    """Which of these tokens, (T, ...), are of images, (T,); None where nothing asks for it, or nobody has said.

    Raises:
        ValueError: if it is known of another number of tokens.
    """
    if moe.modality_routing == "shared" or context is None or (is_image_T := context.is_image_token()) is None:
        return None
    if len(is_image_T) != len(x_TD):
        raise ValueError(
            f"modality_routing is {moe.modality_routing!r}, but the LLM reads {len(x_TD)} tokens where the model was "
            f"given {len(is_image_T)}, so that its router cannot tell which of them are of images. Expected one for "
            'each; choose modality_routing "shared" for this model.'
        )
    return is_image_T.to(x_TD.device)  # layers may be spread over several


def bar_closed(moe: Any, score_TE: Tensor, logits_TE: Tensor) -> Tensor:
    """Scores by which a closed expert is never chosen: where an open one's score is 0 too, in float32, or a bias is
    added, the closed one's 0 would not be enough.

    Args:
        moe: the part's `MoEConfig`.
        score_TE: what experts are chosen by, (T, E).
        logits_TE: the router's, in which a closed expert has the lowest number, (T, E).
    """
    if not is_pooled(moe):
        return score_TE
    return score_TE.masked_fill(logits_TE == torch.finfo(logits_TE.dtype).min, float("-inf"))


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
            "Use the whole vision-language model, not its language model alone."
        )
    images, text, _ = moe.modality_experts
    expert_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    closed_to_text = expert_E < images
    closed_to_images = (expert_E >= images) & (expert_E < images + text)
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
