"""What lmms-eval finds by the entry point `lmms_eval.models`: `lmms_eval --model vlmoe`."""

from typing import Any


def manifest() -> Any:
    """The model's name and class, as lmms-eval registers them; lmms-eval itself calls this."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlmoe", chat_class_path="modeling_vlmoe.finetune.evaluate.lmms.VLMoE")
