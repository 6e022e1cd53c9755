"""What the models return. Trainers leave the routing out of predictions: see `keys_to_ignore_at_inference`."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


@dataclass
class VLMoEModelOutputWithPast(BaseModelOutputWithPast):
    """Outputs of [`VLMoEModel`].

    Attributes:
        image_hidden_states: the connector's output, (images x tokens, text width).
        router_logits: of the LLM's sparse layers, each (batch x sequence, experts), float32, detached.
        vision_router_logits: of the ViT's sparse layers, each (images x tokens, experts).
        connector_router_logits: of the connector, one (images x tokens, experts).
        router_losses: in training, per sparse part the layers' balance and z losses, (layers, 2), detached.
        aux_loss: in training, the parts' losses weighted by their coefficients, a detached scalar. Their gradient is
            attached inside the sparse blocks, so `loss` does not hold it and nothing is to be added to it.
    """

    image_hidden_states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    vision_router_logits: tuple[Tensor, ...] | None = None
    connector_router_logits: tuple[Tensor, ...] | None = None
    router_losses: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None


@dataclass
class VLMoECausalLMOutputWithPast(ModelOutput):
    """Outputs of [`VLMoEForConditionalGeneration`]: those of [`VLMoEModelOutputWithPast`], with

    Attributes:
        loss: the task loss, a scalar, where `labels` are given.
        logits: (batch, kept positions, vocabulary).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    vision_router_logits: tuple[Tensor, ...] | None = None
    connector_router_logits: tuple[Tensor, ...] | None = None
    router_losses: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None


@dataclass
class VLMoESequenceClassifierOutputWithPast(VLMoECausalLMOutputWithPast):
    """Outputs of [`VLMoEForSequenceClassification`].

    `logits` are (batch, classes), `loss` is the classification loss.
    """
