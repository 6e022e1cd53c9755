"""The base of our composite's classes."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint_folder import CheckpointFolder
from .companions import hub_keywords
from .configuration_in_place import BODY
from .configuration_vlmoe import VLMoEConfig
from .modeling_in_place import HOME, is_in_place, sparse_class_of
from .routers import ROUTER_WEIGHTS
from .towers import init_sparse_weights


class VLMoEPreTrainedModel(CheckpointFolder, PreTrainedModel):
    """What all heads share.

    Attributes:
        body_mapping: the host's table of the classes that this one stands for, where the configuration is that of a
            host's VLM that is sparse in place.
    """

    __module__ = HOME
    body_mapping: str = ""
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
    _keep_in_fp32_modules_strict = list(ROUTER_WEIGHTS)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if is_in_place(config):
            raise ValueError(
                f"{type(self).__name__} is built of towers, but this is the configuration of a "
                f"{getattr(config, BODY)} that is sparse in place. Build it by "
                "AutoModelForImageTextToText.from_config(config)."
            )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the host would search this file for the experts' decorator

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_sparse_weights(module, self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As the host does; a host's VLM that is sparse in place is loaded in the class made for it."""
        config: Any = kwargs.get("config")
        if config is None and pretrained_model_name_or_path is not None:
            values, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_keywords(kwargs))
            config = values if BODY in values else None
        if is_in_place(config):
            return sparse_class_of(cls, config).from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if is_in_place(config):
            return sparse_class_of(cls, config)._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)
