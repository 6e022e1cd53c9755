"""What servers of transformers models look up by name, told about this architecture.

`transformers serve`, vLLM and SGLang do not ask the Auto classes first: they look for the class named in config.json
in the module `transformers`, and `transformers serve` also in its static table of multimodal models (transformers
5.23). vLLM calls `register_with_servers` in each of its processes, through the entry point `vllm.general_plugins`.
"""

import sys
from types import ModuleType
from typing import Any

HOST = "transformers"


def copies_of_host() -> list[ModuleType]:
    """Every module object `transformers` that somebody holds.

    There are two once `transformers.processing_utils` is imported, which loads the package anew (5.23); who imported
    it before keeps the first.
    """
    held = [vars(module).get(HOST) for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    found = [sys.modules[HOST], *(one for one in held if isinstance(one, ModuleType) and one.__name__ == HOST)]
    return list({id(one): one for one in found}.values())


def register_with_servers() -> None:
    """Makes the architecture known to servers that run in this process; may be called again."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    import modeling_vlmoe

    modeling_vlmoe.register()
    model_class: Any = modeling_vlmoe.VLMoEForConditionalGeneration
    for host in copies_of_host():
        setattr(host, model_class.__name__, model_class)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[modeling_vlmoe.VLMoEConfig.model_type] = model_class.__name__
