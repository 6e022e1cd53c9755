"""Every router, as fields of a `MoEConfig`: a new router is a new row, and is tested by every test that takes rows."""

from dataclasses import dataclass, field
from typing import Any

from modeling_vlmoe.moe_config import PARTS
from tests.models import EXPERTS

IMAGE_PARTS = ("vision", "connector")


@dataclass(frozen=True)
class RouterRow:
    """One way to route.

    Attributes:
        fields: of the `MoEConfig` of each part.
        parts: where it is allowed.
        is_exact: whether an upcycled model computes what its dense parents compute.
        inputs: what the model's inputs need beside those of `tests.models.batch`, made from these.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = PARTS
    is_exact: bool = True
    inputs: Any = None

    def parts_fields(self, **more: Any) -> dict[str, Any]:
        """`text_moe`, `vision_moe` and `connector_moe` of a model with this router wherever it is allowed."""
        return {f"{part}_moe": (EXPERTS | self.fields | more) if part in self.parts else None for part in PARTS}


ROUTERS: dict[str, RouterRow] = {
    "softmax": RouterRow(),
    "sigmoid": RouterRow({"router_type": "sigmoid"}),
    "expert bias": RouterRow({"use_expert_bias": True}),
    "sigmoid, expert bias": RouterRow({"router_type": "sigmoid", "use_expert_bias": True}),
    "logit norm": RouterRow({"router_logit_norm": 1.5}),
    "raw": RouterRow({"norm_topk_prob": False}, is_exact=False),
    "raw sigmoid": RouterRow({"norm_topk_prob": False, "router_type": "sigmoid"}, is_exact=False),
    "expert choice": RouterRow({"router_type": "expert_choice"}, IMAGE_PARTS, is_exact=False),
    "raw expert choice": RouterRow(
        {"router_type": "expert_choice", "norm_topk_prob": False}, IMAGE_PARTS, is_exact=False
    ),
    "per-layer experts": RouterRow({"num_experts": [2, 4]}, ("vision",)),
}
