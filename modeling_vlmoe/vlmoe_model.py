"""The body of our composite: a ViT, a connector and an LLM in LLaVA's form, without a head."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults

from .blank_image import encode_nothing, needs_blank_image
from .configuration_vlmoe import VLMoEConfig
from .connector import VLMoEConnector
from .expert_choice import with_counts
from .fsdp_plan import wrap_vision_layers
from .image_inputs import check_strategy, find_form, read_features, tokens_in_tower, tokens_of_images, tower_arguments
from .model_outputs import VLMoEModelOutputWithPast
from .modeling_in_place import HOME
from .part_images import PartImages
from .part_requests import context_kwargs
from .parts import write_text_width
from .pretrained import VLMoEPreTrainedModel
from .recorders import install_recorders
from .router_losses import RouterContext
from .routing import RoutedModel
from .towers import make_sparse, num_prefix_tokens
from .visible_text import with_visible_text


def _build_tower(config: Any, moe: Any, text_width: int) -> PreTrainedModel:
    """A tower from its configuration, sparse where the part has experts."""
    requested = config._experts_implementation
    # A dense class refuses a request for a kernel, which is meant for the parts that have experts.
    config._experts_implementation_internal = None
    tower = AutoModel.from_config(config)
    return tower if moe is None else make_sparse(tower, moe, requested, text_width=text_width)


class VLMoEModel(RoutedModel, VLMoEPreTrainedModel):
    """ViT, connector and LLM, without a language modelling head.

    Args:
        config: the configuration; `vision_feature_select_strategy` and `vision_num_prefix_tokens` are resolved in it
            where they were None.

    Attributes:
        image_form: how images are given to the ViT (see image_inputs.py).
    """

    __module__ = HOME
    body_mapping = "MODEL_MAPPING"

    def __init__(self, config: VLMoEConfig):
        config.check_experts()
        super().__init__(config)
        text_width = config.text_config.hidden_size
        self.vision_tower = _build_tower(config.vision_config, config.vision_moe, text_width)
        self.connector = VLMoEConnector(config)
        self.language_model = _build_tower(config.text_config, config.text_moe, text_width)
        self.image_form = find_form(type(self.vision_tower))
        num_prefix = num_prefix_tokens(self.vision_tower)
        if config.vision_feature_select_strategy is None:
            config.vision_feature_select_strategy = "default" if num_prefix else "full"
        if config.vision_num_prefix_tokens is None:
            config.vision_num_prefix_tokens = num_prefix or 1
        check_strategy(self.image_form, config.vision_config, config.vision_feature_select_strategy)
        write_text_width(config, self.language_model)
        self.post_init()
        install_recorders(self)

    def init_parallel_plans(self) -> None:
        """As the host does, with the vision tower's layers wrapped one by one (the host's default names `layers.*`
        only).
        """
        super().init_parallel_plans()
        wrap_vision_layers(self, "vision_tower", self.vision_tower)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_grid_thw: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        router_context: RouterContext | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes images into embeddings of the LLM.

        Args:
            pixel_values: (images, channels, height, width), or as the ViT's image processor gives patches.
            vision_feature_layer: which hidden state of the ViT is read; the configuration's where None.
            vision_feature_select_strategy: "default" drops the tokens before the patches, "full" keeps all.
            image_grid_thw: (images, 3), sizes in patches, where the ViT takes packed patches (Qwen2.5-VL).
            image_sizes: (images, 2), sizes in pixels, where it takes padded images (Pixtral).
            pixel_attention_mask: (images, most patches), where it takes padded patches (SigLIP2 NaFlex).
            spatial_shapes: (images, 2), sizes in patches, where it takes padded patches.
            router_context: the context of the sparse layers in training, or where routers read text.

        Returns:
            The ViT's hidden states and attentions, with `pooler_output` a list of one (tokens, text width) tensor per
            image, and `router_logits`, `connector_router_logits`, `router_losses`, `connector_router_losses` where
            they arise.
        """
        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else list(vision_feature_layer or ())
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = layers  # only these are kept
        if self.config.vision_moe is not None:
            kwargs |= context_kwargs(router_context and router_context.of("vision"))
        given = {
            "image_grid_thw": image_grid_thw,
            "image_sizes": image_sizes,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        kwargs |= tower_arguments(self.image_form, given)
        outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        strategy = vision_feature_select_strategy
        features, counts = read_features(outputs, self.config, self.image_form, given, layers, strategy)
        connector_context = router_context and router_context.of("connector")
        connector_context = with_counts(connector_context, counts, self.config.connector_moe)
        embeddings, logits, losses = self.connector(features.to(self.connector.dtype), connector_context)
        # Of a class of its own: ViTs' outputs may have no `pooler_output` (SAM), or more that `generate` would repeat.
        found = BaseModelOutputWithPooling(
            last_hidden_state=outputs[0],
            pooler_output=list(embeddings.flatten(0, 1).split(counts)),  # type: ignore[arg-type]
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        for name in ("router_logits", "router_losses"):
            if outputs.get(name) is not None:
                found[name] = outputs[name]
        if logits is not None:
            found["connector_router_logits"] = (logits,)
        if losses is not None:
            found["connector_router_losses"] = (losses,)
        return found

    def context_of_images(
        self,
        context: RouterContext | None,
        image_inputs: dict[str, Any],
        mm_token_type_ids: Tensor | None,
        attention_mask: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> RouterContext | None:
        """A pass' context with what routers read of its images and of the text around them.

        Args:
            context: the pass'; None where there was nothing to hand down.
            image_inputs: what the image processor gave, by its names: `pixel_values`, and the images' sizes.
            mm_token_type_ids: (batch, sequence), which marks the text that belongs to the images.

        The other arguments are those of `forward`.

        Raises:
            ValueError: if a router reads text, and it is not marked.
        """
        form, vision = self.image_form, self.config.vision_config
        sized = image_inputs["pixel_values" if form.sizes is None else form.sizes]
        if sized is None:
            return context  # `tower_arguments` says what is missing
        counts = tokens_of_images(form, vision, image_inputs)
        images = {
            "vision": PartImages(len(sized), tokens_in_tower(form, vision, image_inputs)),
            "connector": PartImages(len(sized), counts),
        }
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        return with_visible_text(
            self, context, images, counts, mm_token_type_ids, attention_mask, input_ids, inputs_embeds
        )

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where the image tokens are, (batch, sequence, 1), checked against the number of image features.

        Raises:
            ValueError: if the counts differ.
        """
        if self.config.image_token_id is None:
            raise ValueError(
                "Images were given, but config.image_token_id is not set. Set it to the id of the processor's image "
                "token."
            )
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens, num_features = mask.sum(), image_features.shape[0]
        torch_compilable_check(
            num_tokens == num_features,
            lambda: (
                f"The text holds {num_tokens} image tokens (id {self.config.image_token_id}), but the images give "
                f"{num_features} features. Use the model's own processor, give each image one placeholder, and do not "
                "truncate the prompt inside image tokens."
            ),
        )
        return mask.unsqueeze(-1)

    def _insert_images(self, input_ids: Tensor | None, inputs_embeds: Tensor, images: Any) -> tuple[Tensor, Tensor]:
        """Puts the images' features, (tokens, text width) each, in their places.

        Gives the embeddings and all features.
        """
        features = torch.cat(list(images)).to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, features)
        return inputs_embeds.masked_scatter(mask, features), features

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
        output_router_logits: bool | None = None,
        router_context: RouterContext | None = None,
        **kwargs: Any,
    ) -> VLMoEModelOutputWithPast:
        """Runs images and text.

        Args:
            input_ids: (batch, sequence), with one image token per image feature.
            pixel_values: (images of the whole batch in reading order, channels, height, width), or as the ViT's image
                processor gives patches.
            attention_mask: (batch, sequence), 1 for real tokens.
            inputs_embeds: (batch, sequence, text width), in the place of `input_ids`.
            mm_token_type_ids: (batch, sequence), 1 at image tokens; 3 at the text that belongs to images, where a
                router reads it (see visible_text.py).
            image_grid_thw: sizes of images, where the ViT takes such (see `get_image_features`); the same for
                `image_sizes`, `spatial_shapes` and `pixel_attention_mask`.
            mm_encoder_outputs: images encoded beforehand, `{"image": ...}`, as `generate` does.
            output_router_logits: whether to return the router logits; the configuration's where None.
            router_context: handed in by a head that watches its loss; made here otherwise.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if images come twice, if the
                number of image tokens is not that of image features, or if a router reads text that is not marked.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image is not None:
            raise ValueError("Images came twice, as pixel_values and as mm_encoder_outputs; give one of them.")
        if output_router_logits is None:
            output_router_logits = bool(getattr(self.config.text_config, "output_router_logits", False))
        if router_context is None:
            router_context = self.router_context(
                attention_mask,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                marks=mm_token_type_ids,
                has_images=pixel_values is not None or image is not None,
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_inputs = {
                "pixel_values": pixel_values,
                "image_grid_thw": image_grid_thw,
                "image_sizes": image_sizes,
                "pixel_attention_mask": pixel_attention_mask,
                "spatial_shapes": spatial_shapes,
            }
            router_context = self.context_of_images(
                router_context, image_inputs, mm_token_type_ids, attention_mask, input_ids, inputs_embeds
            )
            image = self.get_image_features(
                **image_inputs,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                router_context=router_context,
                output_router_logits=output_router_logits,
                return_dict=True,
            )
        nothing = encode_nothing(self) if image is None and needs_blank_image(self, past_key_values) else None
        image_features = None
        if image is not None:
            inputs_embeds, image_features = self._insert_images(input_ids, inputs_embeds, image["pooler_output"])
        if nothing is not None:
            inputs_embeds = inputs_embeds + nothing.to(inputs_embeds)
        if self.config.text_moe is not None:
            text_context = router_context and router_context.of("text")
            kwargs |= context_kwargs(text_context) | {"output_router_logits": output_router_logits}
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        found = {
            "text": outputs.get("router_losses"),
            "vision": image and image.get("router_losses"),
            "connector": image and image.get("connector_router_losses"),
        }
        router_losses, aux_loss = self.weigh_losses(found, outputs.last_hidden_state.device)
        image_logits = image if output_router_logits and image is not None else {}
        return VLMoEModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_features,
            router_logits=outputs.get("router_logits") if output_router_logits else None,
            vision_router_logits=image_logits.get("router_logits"),
            connector_router_logits=image_logits.get("connector_router_logits"),
            router_losses=router_losses,
            aux_loss=aux_loss,
        )
