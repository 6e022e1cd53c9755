"""The vision-language model: a ViT, a connector and an LLM in LLaVA's form, each dense or with sparse experts.

`VLMoEForConditionalGeneration.model` is a `VLMoEModel` with `vision_tower`, `connector` and `language_model`;
`lm_head` is outside, and what the dense LLM does to its head's logits is repeated after it.

A checkpoint of a host's VLM that is sparse in place is loaded by the same names, and is of a class derived from the
host's (see modeling_in_place.py).
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_vlmoe import VLMoEConfig
from .early_images import put_context
from .from_parents import adopt_parents, load_parents
from .model_outputs import VLMoECausalLMOutputWithPast
from .pretrained import VLMoEPreTrainedModel
from .router_losses import follow_loss
from .routing import micro_batch_share
from .sequence_classification import VLMoEForSequenceClassification
from .text_head import apply_head_maths, find_head
from .vlmoe_model import VLMoEModel


class VLMoEForConditionalGeneration(VLMoEPreTrainedModel, GenerationMixin):
    """The vision-language model with its language modelling head.

    Args:
        config: the configuration.
    """

    body_mapping = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: VLMoEConfig):
        super().__init__(config)
        self.model = VLMoEModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=config.lm_head_bias)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{self._embedding_name()}.weight"}
        self.post_init()

    def _embedding_name(self) -> str:
        """What the LLM calls its token embedding."""
        wanted = self.get_input_embeddings()
        return next(name for name, module in self.model.language_model.named_modules() if module is wanted)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        text_moe: Any = None,
        vision_moe: Any = None,
        connector_moe: Any = None,
        image_token_id: int | None = None,
        experts_implementation: str | None = None,
        **kwargs: Any,
    ) -> "VLMoEForConditionalGeneration":
        """Upcycles two dense parents in memory: experts are copies of the dense MLPs, connector and routers are new.

        Args:
            vision_model_name_or_path: folder or Hub id of a ViT, also of a CLIP, SigLIP or LLaVA around it.
            text_model_name_or_path: folder or Hub id of a dense LLM.
            text_moe: the LLM's experts, a `MoEConfig` or a dict of its fields; None keeps it dense. The same for
                `vision_moe` and `connector_moe`.
            image_token_id: the placeholder's id; it may be set later, once the processor is known.
            experts_implementation: the kernel.
            **kwargs: given to both parents' `from_pretrained` (dtype, device_map, ...); without a dtype the ViT gets
            the LLM's.

        Raises:
            ValueError: if a part cannot carry the experts asked for.
        """
        text, vision = load_parents(vision_model_name_or_path, text_model_name_or_path, **kwargs)
        config = VLMoEConfig(
            text_config=text.config.to_dict(),
            vision_config=vision.config.to_dict(),
            text_moe=text_moe,
            vision_moe=vision_moe,
            connector_moe=connector_moe,
            image_token_id=image_token_id,
            lm_head_bias=find_head(text)[1].bias is not None,
        )
        config.dtype = text.dtype
        with torch.device("meta"):
            model = cls(config)
        adopt_parents(model, text, vision, experts_implementation)
        return model.eval()

    def _supports_mm_encoder_outputs(self) -> bool:
        # `generate` encodes images before forward, where FSDP has not gathered the tower's weights yet.
        return not isinstance(self, FSDPModule)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any
    ) -> dict[str, Any]:
        put_context(self, inputs_tensor, model_kwargs, model_input_name)
        host: Any = super()  # whose `self` is annotated as a protocol of the host's
        return host._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        # An LLM without a cache (GPT-1), or with one of its own kind (xLSTM), reads the whole sequence at each step.
        if "past_key_values" not in inspect.signature(self.model.language_model.forward).parameters:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As [`VLMoEModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> VLMoECausalLMOutputWithPast:
        """Runs images and text, and the head.

        Args:
            labels: (batch, sequence), -100 where there is no target.
            logits_to_keep: how many of the last positions get logits (0: all), or their indices.

        The other arguments are those of [`VLMoEModel.forward`].
        """
        share = micro_batch_share(labels, kwargs.get("num_items_in_batch"))
        has_images = pixel_values is not None or mm_encoder_outputs is not None
        context = self.model.router_context(
            attention_mask, share, labels is not None, input_ids, inputs_embeds, mm_token_type_ids, has_images
        )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            image_grid_thw=image_grid_thw,
            image_sizes=image_sizes,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            mm_encoder_outputs=mm_encoder_outputs,
            output_router_logits=output_router_logits,
            router_context=context,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = apply_head_maths(self.config.text_config, self.lm_head(outputs.last_hidden_state[:, kept, :]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            loss = follow_loss(loss, context)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return VLMoECausalLMOutputWithPast(loss=loss, logits=logits, **fields)


__all__ = ["VLMoEForConditionalGeneration", "VLMoEForSequenceClassification", "VLMoEModel", "VLMoEPreTrainedModel"]
