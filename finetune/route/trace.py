"""What the routers do with every token of a pass, kept for whoever reads it."""

from dataclasses import fields

import torch

from ..router_load import Layer, Routed, RouterLoad


class RoutingTrace(RouterLoad):
    """Keeps each pass' routing while it is attached, on the CPU; of a ViT that runs several times in a pass, in order.

    Attributes:
        routed: for each sparse layer, what it did with the tokens of the pass.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        self.routed: dict[Layer, Routed] = {}

    def take(self, layer: Layer, routed: Routed) -> None:
        """Keeps one pass of a layer."""
        values = {item.name: getattr(routed, item.name).detach().cpu() for item in fields(routed)}
        if layer in self.routed:
            values = {name: torch.cat([getattr(self.routed[layer], name), value]) for name, value in values.items()}
        self.routed[layer] = Routed(**values)

    def reset(self) -> None:
        """Forgets the pass."""
        super().reset()
        self.routed.clear()
