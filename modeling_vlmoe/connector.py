"""The connector: from the ViT's features to the LLM's embeddings, a 2-layer MLP or a mixture of such MLPs (CuMo,
2405.05949).
"""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_vlmoe import VLMoEConfig, feature_width
from .delta_experts import DeltaExperts
from .mlp_layouts import find_layout
from .parts_config import feature_layers
from .router_losses import RouterContext
from .sparse_moe import Experts, SparseMoE
from .towers import mark_initialized


class ConnectorMLP(nn.Module):
    """Linear, activation, Linear, as in LLaVA-1.5 (2310.03744)."""

    def __init__(self, config: VLMoEConfig):
        super().__init__()
        if config.connector_hidden_act not in ACT2FN:
            raise ValueError(
                f"connector_hidden_act is {config.connector_hidden_act!r}; expected one of "
                f"{', '.join(sorted(ACT2FN))}."
            )
        features = len(feature_layers(config)) * feature_width(config.vision_config)
        width = config.text_config.hidden_size
        middle = getattr(config.connector_moe, "moe_intermediate_size", None) or width
        self.linear_1 = nn.Linear(features, middle, bias=config.connector_bias)
        self.act = ACT2FN[config.connector_hidden_act]
        self.linear_2 = nn.Linear(middle, width, bias=config.connector_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (images, tokens, vision width) to (images, tokens, text width)."""
        return self.linear_2(self.act(self.linear_1(features)))


class VLMoEConnector(nn.Module):
    """The connector of a [`VLMoEModel`]; `mlp` is a `ConnectorMLP` or a `SparseMoE` in its place."""

    def __init__(self, config: VLMoEConfig):
        super().__init__()
        self.mlp: nn.Module = ConnectorMLP(config)
        if config.connector_moe is not None:
            self.make_sparse(config)

    def make_sparse(self, config: VLMoEConfig, copy: bool = False) -> None:
        """Puts experts in the place of the dense MLP; with `copy` each of them is that MLP."""
        dense = self.mlp
        block = SparseMoE(config, config.connector_moe, dense, num_layers=1, text_width=config.text_config.hidden_size)
        if copy:
            block.experts.copy_dense(dense, find_layout(dense, "connector.mlp"))
            mark_initialized(block.experts)
        self.mlp = block

    @property
    def dtype(self) -> torch.dtype:
        """What the features are cast to: towers may come in different precisions."""
        # Searched for, because adapters wrap experts and Linears.
        for module in self.mlp.modules():
            if isinstance(module, (DeltaExperts, Experts)):
                return module.down_proj.dtype
            if isinstance(module, nn.Linear):
                return module.weight.dtype
        raise AssertionError("a connector has experts or Linears")

    def forward(
        self, features: Tensor, context: RouterContext | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Maps (images, tokens, vision width) to (images, tokens, text width).

        Returns:
            The embeddings; the router logits (images x tokens, experts), None where dense; the (balance, z) losses in
            training.
        """
        if isinstance(self.mlp, SparseMoE):
            return self.mlp(features, context=context, returns_routing=True)
        return self.mlp(features), None, None
