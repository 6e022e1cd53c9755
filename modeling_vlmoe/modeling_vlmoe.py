"""The vision-language model: a ViT, a connector and an LLM in LLaVA's form, each dense or with sparse experts.

`VLMoEForConditionalGeneration.model` is a `VLMoEModel` with `vision_tower`, `connector` and `language_model`;
`lm_head` is outside, and what the dense LLM does to its head's logits is repeated after it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults

from .adapter_warnings import warn_of_adapters
from .blank_image import encode_nothing, needs_blank_image
from .companions import read_companions, replace_host_card, write_companions
from .configuration_vlmoe import PARTS, VLMoEConfig
from .connector import VLMoEConnector
from .context_keywords import context_kwargs
from .delta_experts import freeze_bases, refuse_split_deltas
from .expert_precision import warn_of_full_experts
from .from_parents import adopt_parents, load_parents
from .image_inputs import check_strategy, find_form, read_features, tower_arguments
from .model_outputs import (
    VLMoECausalLMOutputWithPast,
    VLMoEModelOutputWithPast,
    VLMoESequenceClassifierOutputWithPast,
)
from .recorders import install_recorders, make_recorders_picklable, register_recorders
from .router_losses import UNSEEN, FollowedLoss, RouterContext, follow_loss, warn_unfollowed, weighted_mean
from .text_head import apply_head_maths, find_head
from .towers import (
    init_sparse_weights,
    make_sparse,
    num_prefix_tokens,
    skip_pooling,
    tower_layers,
)


class VLMoEPreTrainedModel(PreTrainedModel):
    """What all heads share.

    Attributes:
        companions: texts that travel with the weights, by file name (see companions.py).
    """

    companions: dict[str, str] = {}
    config: VLMoEConfig
    config_class = VLMoEConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["router.weight"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the host would search this file for the experts' decorator

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_sparse_weights(module, self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As the host does; the receipt, the history and the card are read too."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model.companions = read_companions(pretrained_model_name_or_path, **kwargs)
        if hasattr(model, "hf_device_map"):
            skip_pooling(model.base_model.vision_tower)
        compute_buffers(model)
        warn_of_full_experts(model)
        freeze_bases(model)
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As the host does, before it loads weights; delta experts are not split.

        Raises:
            ValueError: naming what makes experts of them that are.
        """
        refuse_split_deltas(model, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """As the host does; the receipt, the history and the card are written too (see companions.py)."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            write_companions(self.companions, save_directory)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Both of the host's ways to push end here (transformers 5.23).
        write_companions(self.companions, working_dir)
        replace_host_card(self.companions, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        make_recorders_picklable(self)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register_recorders(self)


def compute_buffers(model: nn.Module) -> None:
    """Lets a tower give its layers' buffers their values, where it does so as a whole (Falcon-H1).

    The host leaves that out below code that is not its own, where the tower has no parameter of itself (transformers
    5.23, `_initialize_weights`). What has been loaded stays.
    """
    for module in model.modules():
        if isinstance(module, VLMoEPreTrainedModel) or not isinstance(module, PreTrainedModel):
            continue
        if not list(module.parameters(recurse=False)):
            type(module)._init_weights(module, module)


def _build_tower(config: Any, moe: Any) -> PreTrainedModel:
    """A tower from its configuration, sparse where the part has experts."""
    requested = config._experts_implementation
    # A dense class refuses a request for a kernel, which is meant for the parts that have experts.
    config._experts_implementation_internal = None
    tower = AutoModel.from_config(config)
    return tower if moe is None else make_sparse(tower, moe, requested)


class VLMoEModel(VLMoEPreTrainedModel):
    """ViT, connector and LLM, without a language modelling head.

    Args:
        config: the configuration; `vision_feature_select_strategy` and `vision_num_prefix_tokens` are resolved in it
            where they were None.

    Attributes:
        image_form: how images are given to the ViT (see image_inputs.py).
        micro_batch_share: the weight of one micro-batch's router losses, that is 1 / accumulation steps, where a
            training loop makes its own loss; None where nobody has said.
        followed: the loss that a trainer makes while it makes it (`modeling_vlmoe.finetune.follow_trainer`).
        warns_of_adapters: whether the first training pass warns of an adapter around the model that cannot be meant.
    """

    micro_batch_share: float | None = None
    followed: FollowedLoss | None = None
    warns_of_adapters: bool = True

    def __init__(self, config: VLMoEConfig):
        config.check_experts()
        super().__init__(config)
        self.vision_tower = _build_tower(config.vision_config, config.vision_moe)
        self.connector = VLMoEConnector(config)
        self.language_model = _build_tower(config.text_config, config.text_moe)
        self.image_form = find_form(type(self.vision_tower))
        num_prefix = num_prefix_tokens(self.vision_tower)
        if config.vision_feature_select_strategy is None:
            config.vision_feature_select_strategy = "default" if num_prefix else "full"
        if config.vision_num_prefix_tokens is None:
            config.vision_num_prefix_tokens = num_prefix or 1
        check_strategy(self.image_form, config.vision_config, config.vision_feature_select_strategy)
        self._write_text_width()
        self.post_init()
        install_recorders(self)

    def _write_text_width(self) -> None:
        """The resolved expert width of the LLM, where other tools look for it."""
        if (moe := self.config.text_moe) is not None:
            _, layers = tower_layers(self.language_model)
            layer = layers[moe.layers[0]]
            moe.moe_intermediate_size = getattr(layer, layer.sparse_attribute).experts.intermediate_size
            if moe.num_shared_experts and moe.shared_expert_intermediate_size is None:
                moe.shared_expert_intermediate_size = moe.moe_intermediate_size

    def init_parallel_plans(self) -> None:
        """As the host does, with the vision tower's layers wrapped one by one (the host's default names `layers.*`
        only).
        """
        super().init_parallel_plans()
        path, _ = tower_layers(self.vision_tower)
        idle = [f"{prefix}{name}" for name in ("embed_tokens", "layers.*", "norm") for prefix in ("", "vision_tower.")]
        plan = {rule: how for rule, how in (self._fsdp_plan or {}).items() if rule not in idle}
        self._fsdp_plan = plan | {f"vision_tower.{path}.*": "free_full_weight"}

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
            router_context: the context of the sparse layers in training.

        Returns:
            The ViT's outputs, with `pooler_output` a list of one (tokens, text width) tensor per image, and
            `router_logits`, `connector_router_logits`, `router_losses`, `connector_router_losses` where they arise.
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
        embeddings, logits, losses = self.connector(features.to(self.connector.dtype), connector_context)
        outputs.pooler_output = list(embeddings.flatten(0, 1).split(counts))
        if logits is not None:
            outputs["connector_router_logits"] = (logits,)
        if losses is not None:
            outputs["connector_router_losses"] = (losses,)
        return outputs

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

    def router_context(
        self, attention_mask: Tensor | None, share: Tensor | None = None, has_loss: bool = False
    ) -> RouterContext | None:
        """The context of this forward pass: in training, where the model has experts.

        Args:
            attention_mask: (batch, sequence), 1 for real tokens.
            share: this micro-batch's share of the optimizer step, where it is known.
            has_loss: whether the task loss is computed by the model, so that it shows what a trainer does to it.
        """
        moes = {part: self.config.moe(part) for part in PARTS}
        sparse = {part: moe for part, moe in moes.items() if moe is not None}  # dynamo takes no walrus in here
        if not (self.training and sparse and torch.is_grad_enabled()):
            return None
        warn_of_adapters(self)
        scale = torch.full((), UNSEEN if has_loss else 1.0, device=self.device)
        context = RouterContext(loss_scale=scale, share=torch.ones((), device=self.device))
        context.parts = {part: (moe.router_aux_loss_coef, moe.router_z_loss_coef) for part, moe in sparse.items()}
        if share is not None:
            context.share = share
        elif not has_loss and self.followed is None:
            if self.micro_batch_share is None:
                warn_unfollowed()
            context.share = torch.tensor(self.micro_batch_share or 1.0, device=self.device)
        if self.followed is not None:
            self.followed.add(context)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            context.token_mask = attention_mask.bool()
        return context

    def _gather_losses(self, image: Any, text: Any) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """The parts' losses, (layers, 2) each, and their weighted sum."""
        found = {
            "text": text.get("router_losses"),
            "vision": image and image.get("router_losses"),
            "connector": image and image.get("connector_router_losses"),
        }
        losses = {part: torch.stack(layers) for part, layers in found.items() if layers}
        if not losses:
            return None, None
        device = text.last_hidden_state.device
        weighted = [weighted_mean(value.to(device), self.config.moe(part)) for part, value in losses.items()]
        return losses, torch.stack(weighted).sum()

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
            mm_token_type_ids: (batch, sequence), 1 at image tokens; accepted because processors return it.
            image_grid_thw: sizes of images, where the ViT takes such (see `get_image_features`); the same for
                `image_sizes`, `spatial_shapes` and `pixel_attention_mask`.
            mm_encoder_outputs: images encoded beforehand, `{"image": ...}`, as `generate` does.
            output_router_logits: whether to return the router logits; the configuration's where None.
            router_context: handed in by a head that watches its loss; made here otherwise.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, if images come twice, or if the
                number of image tokens is not that of image features.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        image = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and image is not None:
            raise ValueError("Images came twice, as pixel_values and as mm_encoder_outputs; give one of them.")
        if output_router_logits is None:
            output_router_logits = bool(getattr(self.config.text_config, "output_router_logits", False))
        if router_context is None:
            router_context = self.router_context(attention_mask)
        if pixel_values is not None:
            image = self.get_image_features(
                pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                image_grid_thw=image_grid_thw,
                image_sizes=image_sizes,
                pixel_attention_mask=pixel_attention_mask,
                spatial_shapes=spatial_shapes,
                router_context=router_context,
                output_router_logits=output_router_logits,
                return_dict=True,
            )
        nothing = encode_nothing(self) if image is None and needs_blank_image(self, past_key_values) else None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
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
        router_losses, aux_loss = self._gather_losses(image, outputs)
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


def _micro_batch_share(labels: Tensor | None, num_items_in_batch: Any) -> Tensor | None:
    """This micro-batch's share of the optimizer step, by target tokens, where the trainer says how many the step
    has.
    """
    if labels is None or num_items_in_batch is None:
        return None
    total = torch.as_tensor(num_items_in_batch, device=labels.device).sum().clamp(min=1)
    return (labels[..., 1:] != -100).sum().float() / total  # as the Trainer counts: nothing predicts the first token


class VLMoEForConditionalGeneration(VLMoEPreTrainedModel, GenerationMixin):
    """The vision-language model with its language modelling head.

    Args:
        config: the configuration.
    """

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
        share = _micro_batch_share(labels, kwargs.get("num_items_in_batch"))
        context = self.model.router_context(attention_mask, share, has_loss=labels is not None)
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


class VLMoEForSequenceClassification(VLMoEPreTrainedModel):
    """The vision-language model with a linear head on the last token, for image and text classification.

    Args:
        config: the configuration; `num_labels` classes.
    """

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
        context = self.model.router_context(attention_mask, has_loss=labels is not None)
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


__all__ = ["VLMoEForConditionalGeneration", "VLMoEForSequenceClassification", "VLMoEModel", "VLMoEPreTrainedModel"]
