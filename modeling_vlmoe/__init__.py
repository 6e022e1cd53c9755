"""vlmoe: upcycle a pretrained dense LLM and a pretrained ViT into a sparse Mixture-of-Experts vision-language model.

`import modeling_vlmoe` registers the architecture with transformers' Auto classes. The `vlmoe` command alone registers
later, when it first needs a class, so that its help does not wait for torch.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .logs import follow_host

__version__ = "0.1.0"

_HOMES = {
    "MoEConfig": "configuration_vlmoe",
    "VLMoEConfig": "configuration_vlmoe",
    "VLMoEForConditionalGeneration": "modeling_vlmoe",
    "VLMoEForSequenceClassification": "modeling_vlmoe",
    "VLMoEModel": "modeling_vlmoe",
    "VLMoEPreTrainedModel": "modeling_vlmoe",
    "VLMoEProcessor": "processing_vlmoe",
    "mark_visible_text": "visible_marks",
}
__all__ = [
    "MoEConfig",
    "VLMoEConfig",
    "VLMoEForConditionalGeneration",
    "VLMoEForSequenceClassification",
    "VLMoEModel",
    "VLMoEPreTrainedModel",
    "VLMoEProcessor",
    "__version__",
    "mark_visible_text",
    "register",
]

if TYPE_CHECKING:  # what type checkers and editors see; __getattr__ gives the real thing
    from .configuration_vlmoe import MoEConfig, VLMoEConfig
    from .modeling_vlmoe import (
        VLMoEForConditionalGeneration,
        VLMoEForSequenceClassification,
        VLMoEModel,
        VLMoEPreTrainedModel,
    )
    from .processing_vlmoe import VLMoEProcessor
    from .visible_marks import mark_visible_text

_is_registered = False


def register() -> None:
    """Registers configuration, models and processor with the Auto classes, and their code for saving; once."""
    global _is_registered
    if _is_registered:
        return
    _is_registered = True
    import transformers

    from .configuration_in_place import listen
    from .configuration_vlmoe import VLMoEConfig
    from .parts_config import AUTO_MAP
    from .processing_vlmoe import VLMoEProcessor

    transformers.AutoConfig.register(VLMoEConfig.model_type, VLMoEConfig)
    VLMoEConfig.register_for_auto_class()
    model_classes: dict[str, Any] = {}
    for auto_name, reference in AUTO_MAP.items():
        if auto_name == "AutoConfig":
            continue
        module, _, name = reference.rpartition(".")
        model_class = model_classes[auto_name] = getattr(import_module(f".{module}", __name__), name)
        getattr(transformers, auto_name).register(VLMoEConfig, model_class)
        # One auto class per class is all the host writes; the configuration's own auto_map names the others.
        if model_class._auto_class is None:
            model_class.register_for_auto_class(auto_name)
    transformers.AutoProcessor.register(VLMoEConfig, VLMoEProcessor)
    VLMoEProcessor.register_for_auto_class()

    def register_in_place(config_class: type) -> None:
        for auto_name, model_class in model_classes.items():
            getattr(transformers, auto_name).register(config_class, model_class)

    listen(register_in_place)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


follow_host()
if Path(sys.argv[0] if sys.argv else "").name not in ("vlmoe", "vlmoe.exe"):
    register()
