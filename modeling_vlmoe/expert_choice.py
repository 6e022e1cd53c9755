"""Expert choice: experts choose tokens, not tokens experts (Zhou et al., 2202.09368; Sparse Upcycling, 2212.05055).

Of an image of n tokens each of E experts takes the C = ceil(k n / E) tokens that score best with it, k being
`num_experts_per_tok`: the mean number of experts per token, the paper's capacity factor. So every expert gets the same
load by construction, some tokens get many experts, and some none, whose MLP gives 0. A score is the softmax over the
experts; a token's weights are its scores, renormalised over the experts that chose it (`norm_topk_prob`).

Experts choose within one image, so that what an image gives does not depend on the others of its batch. In an LLM a
later token could take an earlier one's place, which is not causal: there it is refused.

What is chosen is given as rows, a token and an expert each, so that kernels compute it as tokens of one expert each.

Shapes: T tokens, E experts, I images, n tokens of an image, R = rows.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .part_images import PartImages
from .router_config import EXPERT_CHOICE
from .router_losses import RouterContext


def chooses_tokens(moe: Any) -> bool:
    """Whether experts choose tokens."""
    return moe.router_type == EXPERT_CHOICE


def capacity(num_tokens: int, num_experts: int, num_picked: int) -> int:
    """How many of an image's tokens each expert takes."""
    return min(-(-num_picked * num_tokens // num_experts), num_tokens)


def with_images(context: RouterContext | None, shape: torch.Size) -> RouterContext:
    """The context of a block whose experts choose tokens: which image each token is of, read off the shape of what the
    block is given, (images, ..., width), where nobody has said.

    Raises:
        ValueError: if the shape does not say.
    """
    if context is None:
        context = RouterContext(learns=False)
    if context.own_images is not None:
        return context
    if len(shape) < 3:
        raise ValueError(
            f"A block whose router_type is {EXPERT_CHOICE!r} is given tokens of all images in one row, "
            f"{tuple(shape)}, and it is not known which image each is of, as in the connectors of some VLMs that are "
            "made sparse in place. Choose another router_type for that part (connector_moe)."
        )
    return replace(context, own_images=PartImages(shape[0]))


def with_counts(context: RouterContext | None, counts: list[int], moe: Any) -> RouterContext | None:
    """The context of a connector, which is given the tokens of all images in one row: each image has so many of them.
    Nothing is added where no expert chooses tokens.
    """
    if moe is None or not chooses_tokens(moe) or (context is not None and context.own_images is not None):
        return context
    context = RouterContext(learns=False) if context is None else context
    return replace(context, own_images=PartImages(len(counts), tuple(counts)))


def token_groups(images: PartImages, mask_T: Tensor | None, num_tokens: int, device: torch.device) -> list[Tensor]:
    """The tokens of images, (images, n) each: all at once where images have the same number, else one by one.

    Args:
        images: whose tokens they are.
        mask_T: which are real, (T,); None where all are.
        num_tokens: T.
        device: of the tokens.

    Raises:
        ValueError: if the tokens are not those of the images.
    """
    image_T = images.of_token(num_tokens, device)  # refuses what does not fit
    token_T = torch.arange(num_tokens, device=device)
    if mask_T is not None:
        kept = [token_T[mask_T & (image_T == image)] for image in range(images.number)]
        return [one[None] for one in kept if len(one)]
    if images.counts is None:
        return [token_T.view(images.number, -1)] if num_tokens else []
    return [one[None] for one in token_T.split(list(images.counts)) if len(one)]


def choose_tokens(
    logits_TE: Tensor, num_picked: int, images: PartImages, mask_T: Tensor | None = None, is_renormalized: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Has each expert choose the tokens of each image that score best with it.

    Args:
        logits_TE: (T, E).
        num_picked: k, experts per token in the mean.
        images: whose tokens they are.
        mask_T: which of them are real, (T,); None where all are.
        is_renormalized: whether the weights of a token sum to one, over the experts that chose it.

    Returns:
        The weights (R, 1), the experts (R, 1) and the tokens (R,).

    Raises:
        ValueError: if the tokens are not those of the images.
    """
    num_tokens, num_experts = logits_TE.shape
    score_TE = logits_TE.log_softmax(-1)  # in the order of the softmax, and never 0
    nothing = torch.zeros(0, dtype=torch.long, device=logits_TE.device)
    tokens, experts = [nothing], [nothing]
    for group_In in token_groups(images, mask_T, num_tokens, logits_TE.device):
        count = capacity(group_In.shape[1], num_experts, num_picked)
        best_IEC = score_TE.detach()[group_In].transpose(1, 2).topk(count, dim=-1).indices
        tokens.append(group_In[:, None].expand(-1, num_experts, -1).gather(2, best_IEC).reshape(-1))
        expert_E = torch.arange(num_experts, device=logits_TE.device)
        experts.append(expert_E[None, :, None].expand_as(best_IEC).reshape(-1))
    token_R, expert_R = torch.cat(tokens), torch.cat(experts)
    score_R = score_TE[token_R, expert_R]
    if is_renormalized:
        highest_T = score_R.new_full((num_tokens,), float("-inf"))
        highest_T = highest_T.scatter_reduce(0, token_R, score_R.detach(), "amax")
        weight_R = (score_R - highest_T[token_R]).exp()
        weight_R = weight_R / torch.zeros_like(highest_T).index_add(0, token_R, weight_R)[token_R]
    else:
        weight_R = score_R.exp()
    return weight_R[:, None], expert_R[:, None], token_R


def add_rows(out_RO: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    """The sum of each token's rows, (T, O); 0 for a token that no expert chose."""
    return out_RO.new_zeros(num_tokens, out_RO.shape[1]).index_add(0, token_R, out_RO)
