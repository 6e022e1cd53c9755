"""How a model routes, in the words of its card."""

from collections.abc import Mapping
from typing import Any

TEXT_GATE = "attention"
KINDS = {
    "sigmoid": "scored by sigmoids",
    "expert_choice": "experts choosing tokens",
    TEXT_GATE: "routed by the text beside the image too",
}
NEEDS_TEXT = (
    "Its images are routed by the text beside them: give the model all that its processor returns "
    "(`mm_token_type_ids`). Serving engines that encode images without text cannot run it."
)


def modality_words(moe: Mapping[str, Any]) -> list[str]:
    """How image tokens and text tokens are routed, where not alike."""
    kind, pools = moe.get("modality_routing") or "shared", moe.get("modality_experts")
    if kind == "shared":
        return []
    own = f": {pools[0]} of images, {pools[1]} of text, {pools[2]} of both" if pools else ""
    return [f"routed by modality (`{kind}`{own})"]


def routing_words(moe: Mapping[str, Any]) -> str:
    """What is not the default in how a part routes, behind a comma; empty where nothing is."""
    kind = moe.get("router_type")
    words = [KINDS[kind]] if isinstance(kind, str) and kind in KINDS else []
    if moe.get("norm_topk_prob") is False:
        words.append("weights not renormalised")
    if moe.get("use_expert_bias") is True:
        words.append("choices balanced by biases")
    if moe.get("router_logit_norm") is not None:
        words.append("router logits normalised")
    return "".join(f", {one}" for one in words + modality_words(moe))


def reads_text(moes: list[Mapping[str, Any] | None]) -> bool:
    """Whether some part of a model routes images by text."""
    return any(moe is not None and moe.get("router_type") == TEXT_GATE for moe in moes)
