"""The composite with a classification head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .configuration_vlmoe import VLMoEConfig
from .model_outputs import VLMoESequenceClassifierOutputWithPast
from .modeling_in_place import HOME
from .pretrained import VLMoEPreTrainedModel
from .router_losses import follow_loss
from .vlmoe_model import VLMoEModel


class VLMoEForSequenceClassification(VLMoEPreTrainedModel):
    """The vision-language model with a linear head on the last token, for image and text classification.

    Args:
        config: the configuration; `num_labels` classes.
    """

    __module__ = HOME
    # The loss is a mean over samples, not over `num_items_in_batch`, so the Trainer has to divide it by the steps.
    accepts_loss_kwargs = False

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = VLMoEModel(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels or 2, bias=False)
        self.post_init()

    def _last_tokens(self, input_ids: Tensor | None, attention_mask: Tensor | None, length: int) -> Tensor:
        """The position of each row's last real token, (batch,), or the last position where padding is unknown.

        Raises:
            ValueError: if rows of several samples may be padded and nothing tells where.
        """
        pad = self.config.text_config.pad_token_id
        if attention_mask is not None:
            is_real = attention_mask.bool()
        elif input_ids is not None and pad is not None:
            is_real = input_ids != pad
        elif input_ids is None or len(input_ids) == 1:
            return torch.tensor([length - 1], device=self.device)
        else:
            raise ValueError("Several samples, and no padding known: give attention_mask, or set config.pad_token_id.")
        positions = torch.arange(length, device=is_real.device)
        return (positions * is_real).argmax(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> VLMoESequenceClassifierOutputWithPast:
        """Classifies each sample.

        Args:
            labels: (batch,) classes, or what `config.problem_type` calls for.

        The other arguments are those of [`VLMoEModel.forward`].
        """
        has_images = pixel_values is not None or kwargs.get("mm_encoder_outputs") is not None
        context = self.model.router_context(
            attention_mask, None, labels is not None, input_ids, inputs_embeds, mm_token_type_ids, has_images
        )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            image_sizes=image_sizes,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            router_context=context,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last_tokens(input_ids, attention_mask, hidden.shape[1])
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = follow_loss(loss, context)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return VLMoESequenceClassifierOutputWithPast(loss=loss, logits=logits, **fields)
