"""The configuration of a host's VLM that is made sparse in place: the host's own, with the experts of its parts.

It is written under our model type, with the host's in `body_model_type`: whoever reads it finds our code first, and
that finds the host's class. One class is made per class of the host's.

    >>> config = VLMoEConfig.from_dict(qwen_config.to_dict() | {"body_model_type": "qwen2_5_vl", "text_moe": {}})
    >>> isinstance(config, Qwen2_5_VLConfig), config.model_type, config.text_moe.num_experts
    (True, 'vlmoe', 8)
"""

from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .moe_config import PARTS
from .parts_config import MODEL_TYPE, ROUTING_OUTPUTS, PartsConfig

BODY = "body_model_type"
# What `keys_to_ignore_at_inference` is where a configuration class does not say it.
NOT_PREDICTED = ("past_key_values",)
_SPARSE_CONFIGS: dict[type, Any] = {}
# Called with each class that is made: the package registers it with the Auto classes.
_LISTENERS: list[Callable[[type], None]] = []


def body_config_class(model_type: str) -> type[PreTrainedConfig]:
    """The host's configuration class for a model type.

    Raises:
        ValueError: if the installed transformers has none, or it is no VLM's.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"body_model_type is {model_type!r}, which the installed transformers does not know. Take the release "
            "that the model was made with (transformers_version in config.json), or a later one."
        )
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"body_model_type is {model_type!r}, which is no VLM of transformers. Expected the model_type of the "
            "dense VLM that the model was made of; restore config.json as it was written."
        )
    return CONFIG_MAPPING[model_type]


def listen(listener: Callable[[type], None]) -> None:
    """Has a function called with every sparse configuration class, those that were made before too."""
    _LISTENERS.append(listener)
    for config_class in _SPARSE_CONFIGS.values():
        listener(config_class)


def _rebuild(dense_class: Any) -> Any:
    made = sparse_config_class(dense_class)
    return made.__new__(made)


def sparse_config_class(dense_class: Any) -> Any:
    """The host's configuration class with the experts of the parts; one per class.

    It has the name of our configuration class, which the host's Auto classes compare with the one that a model class
    says it takes (transformers 5.23).
    """
    if dense_class in _SPARSE_CONFIGS:
        return _SPARSE_CONFIGS[dense_class]

    def __post_init__(self, **kwargs):
        PartsConfig.__post_init__(self, **kwargs)
        self.resolve_parts()

    def __reduce_ex__(self, protocol):
        return _rebuild, (dense_class,), self.__dict__

    def to_dict(self):
        return PartsConfig.to_dict(self) | {BODY: dense_class.model_type}

    def from_dict(cls, config_dict, **kwargs):
        given = {name: value for name, value in config_dict.items() if name not in (BODY, "model_type")}
        return dense_class.from_dict.__func__(cls, given, **kwargs)

    ignored = getattr(dense_class, "keys_to_ignore_at_inference", NOT_PREDICTED)
    members = {
        "__module__": __name__,
        "__qualname__": f"VLMoEConfig.{dense_class.__name__}",
        "__annotations__": {f"{part}_moe": Any for part in PARTS},
        **{f"{part}_moe": None for part in PARTS},
        "__post_init__": __post_init__,
        "__reduce_ex__": __reduce_ex__,
        "to_dict": to_dict,
        "from_dict": classmethod(from_dict),
        "model_type": MODEL_TYPE,
        BODY: dense_class.model_type,
        "dense_class": dense_class,
        "keys_to_ignore_at_inference": [*ignored, *ROUTING_OUTPUTS, "image_hidden_states"],
    }
    made: Any = strict(type("VLMoEConfig", (PartsConfig, dense_class), members))
    _SPARSE_CONFIGS[dense_class] = made
    for listener in _LISTENERS:
        listener(made)
    return made
