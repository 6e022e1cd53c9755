"""What a part is asked for by a model whose own forward, the host's, knows nothing of routers."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .router_losses import RouterContext

# The keyword by which a layer receives the router's context.
CONTEXT = "router_context"


def context_kwargs(context: RouterContext | None) -> dict[str, Any]:
    """The keywords for a tower's forward that bring its sparse layers their context and report their losses."""
    if context is None:
        return {}
    return {CONTEXT: context} | ({"output_router_losses": True} if context.learns else {})


@dataclass
class PartRequest:
    """What one part is handed for one pass, and what it gives: left on it before the host's forward runs.

    Attributes:
        context: the part's; None where nothing is learnt.
        wants_logits: whether router logits are asked for.
        router_logits: per sparse layer, (tokens, experts); of every run of the part, one after the other.
        router_losses: per sparse layer, (balance, z), likewise.
    """

    context: RouterContext | None = None
    wants_logits: bool = False
    router_logits: list[Tensor] = field(default_factory=list)
    router_losses: list[Tensor] = field(default_factory=list)

    def keywords(self) -> dict[str, Any]:
        """What a tower's forward is given."""
        return context_kwargs(self.context) | ({"output_router_logits": True} if self.wants_logits else {})

    def take(self, logits: Any, losses: Any) -> None:
        """Takes up what one run gives, per sparse layer; None where it does not."""
        if self.wants_logits and logits is not None:
            self.router_logits += logits
        if losses is not None:
            self.router_losses += [one for one in losses if one is not None]
