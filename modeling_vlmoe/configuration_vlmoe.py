"""Configuration of a sparse vision-language model: two towers, a connector, and which parts of them carry experts.

Invariant: for the LLM, the names that trainers and servers know (`HOSTED_FIELDS`) live on `text_config` and nowhere
else; `config.text_moe` reads and writes them through.

    >>> config = VLMoEConfig(text_config=llama_config, vision_config=siglip_config, text_moe={"num_experts": 8})
    >>> config.text_moe.layers, config.text_config.num_experts_per_tok
    ([0, 1, 2, 3], 2)

`VLMoEConfig.from_dict` reads the configuration of a host's VLM that is sparse in place too (`body_model_type`), and
gives one of a class derived from the host's (see configuration_in_place.py).
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_in_place import BODY, body_config_class, sparse_config_class
from .moe_config import MoEConfig, check_reads_embeddings
from .parts_config import MODEL_TYPE, ROUTING_OUTPUTS, PartsConfig, merges_patches, num_feature_layers


def feature_width(vision_config: Any) -> int:
    """The width of what the connector reads of one hidden state."""
    return vision_config.out_hidden_size if merges_patches(vision_config) else vision_config.hidden_size


@strict
class VLMoEConfig(PartsConfig, PreTrainedConfig):
    r"""Configuration of [`VLMoEForConditionalGeneration`].

    Args:
        text_config: the dense LLM's configuration, of any registered family.
        vision_config: the dense ViT's configuration.
        text_moe: the LLM's experts: a [`MoEConfig`], a dict of its fields, or None for a dense LLM.
        vision_moe: the same for the ViT.
        connector_moe: the same for the connector.
        image_token_id: the placeholder that an image's features replace.
        vision_feature_layer: the hidden state of the ViT that the connector reads (-2: the last layer's input); a list
            is concatenated. None takes -2, or -1 where the ViT merges patches behind its last layer (Qwen2.5-VL): then
            the connector reads what it merged.
        vision_feature_select_strategy: "default" leaves out the tokens that precede the patches, "full" keeps every
            token; None takes "default" where the ViT has a class token or registers.
        vision_num_prefix_tokens: how many tokens "default" leaves out; None takes the ViT's own: its class token and
            its registers, or 1 where it has neither. LLaVA leaves out 1, whatever its ViT.
        connector_hidden_act: the connector's activation.
        connector_bias: whether the connector's Linears have biases.
        lm_head_bias: whether the head has a bias, as the dense LLM's does in some families (Phi, GPT-J).

    Raises:
        ValueError: naming the field, for settings that cannot be built.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
    }
    keys_to_ignore_at_inference = ["past_key_values", *ROUTING_OUTPUTS, "image_hidden_states"]

    text_config: Any = None
    vision_config: Any = None
    text_moe: Any = None
    vision_moe: Any = None
    connector_moe: Any = None
    image_token_id: int | None = None
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    vision_num_prefix_tokens: int | None = None
    connector_hidden_act: str = "gelu"
    connector_bias: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if (body := kwargs.get(BODY)) is not None:
            raise ValueError(
                f"{BODY} is {body!r}: this is the configuration of a {body} that is sparse in place. Make it by "
                "VLMoEConfig.from_dict(...), or AutoConfig.from_pretrained(...)."
            )
        for name in ("text_config", "vision_config"):
            if not isinstance(given := getattr(self, name), (dict, PreTrainedConfig, type(None))):
                raise ValueError(
                    f"{name} is {given!r}; expected a dense tower's configuration, or a dict of its fields."
                )
        super().__post_init__(**kwargs)
        check_reads_embeddings(self.text_config)
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if self.vision_feature_layer is None:
            self.vision_feature_layer = -1 if merges_patches(self.vision_config) else -2
        if (left_out := self.vision_num_prefix_tokens) is not None and left_out < 0:
            raise ValueError(f"vision_num_prefix_tokens is {left_out}; expected 0 or more.")
        num_feature_layers(self)
        self.resolve_parts()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the host does; for a host's VLM that is sparse in place, of the class made for it."""
        if (body := config_dict.get(BODY)) is not None:
            return sparse_config_class(body_config_class(body)).from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


__all__ = ["MoEConfig", "VLMoEConfig"]
