"""How FSDP is told to wrap the layers of a ViT."""

from typing import Any

from torch import nn

from .towers import tower_layers


def wrap_vision_layers(model: Any, name: str, tower: nn.Module) -> None:
    """Has FSDP wrap the layers of a ViT one by one; the host's default names `layers.*` only.

    Args:
        model: the body, whose plan it is.
        name: the ViT's path in it.
        tower: the ViT.
    """
    path, _ = tower_layers(tower)
    idle = [f"{prefix}{rule}" for rule in ("embed_tokens", "layers.*", "norm") for prefix in ("", f"{name}.")]
    plan = {rule: how for rule, how in (model._fsdp_plan or {}).items() if rule not in idle}
    model._fsdp_plan = plan | {f"{name}.{path}.*": "free_full_weight"}
