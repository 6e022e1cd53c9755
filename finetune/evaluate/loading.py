"""A checkpoint to be measured, with its processor: ours, an adapter, or a dense model of transformers as control."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText
from transformers.utils import ADAPTER_CONFIG_NAME

from modeling_vlmoe.conversion import host_processors

from ..checkpoints import check_decoder, load_base, load_base_config, load_finetuned, load_processor
from ..collator import chats_of

OURS = "vlmoe"


def load_host(checkpoint: str, config: Any, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model of transformers and its processor.

    Raises:
        ValueError: if one of them cannot be loaded, or the processor has no chat template.
    """
    check_decoder(checkpoint, config)
    processor = host_processors.open_processor(checkpoint, config.model_type, revision)
    chats_of(processor)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype="auto", revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"The model {checkpoint} ({config.model_type}) cannot be loaded; give one that takes images and text. "
            f"{error}"
        ) from error
    return model, processor


def check_checkpoint(checkpoint: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuses, before data and weights are read, what is neither an adapter nor a model that answers.

    Raises:
        ValueError: naming it.
    """
    if not (Path(checkpoint) / ADAPTER_CONFIG_NAME).is_file():
        check_decoder(checkpoint, load_base_config(checkpoint, revision, trust_remote_code))


def load_checkpoint(checkpoint: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model, an adapter merged into it, and its processor.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    if (Path(checkpoint) / ADAPTER_CONFIG_NAME).is_file():
        model, processor = load_finetuned(checkpoint, trust_remote_code=trust_remote_code)
        model = model.merge_and_unload(safe_merge=True)
    else:
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = load_base_config(checkpoint, **hub)
        if config.model_type == OURS:
            processor = load_processor(checkpoint, config, **hub)
            model = load_base(checkpoint, **hub)
        else:
            model, processor = load_host(checkpoint, config, revision, trust_remote_code)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), processor
