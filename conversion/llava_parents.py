"""A LLaVA read as a vlmoe model: what its configuration's fields and its tensors are called there.

The two have one form, so nothing is computed: the connector has another name, and the LLM's, the ViT's and the head's
tensors have the same.
"""

import copy
from typing import Any

from transformers import LlavaConfig, PreTrainedConfig

from modeling_vlmoe.moe_config import sparse_fields
from modeling_vlmoe.text_head import head_maths

PROJECTOR, CONNECTOR = "model.multi_modal_projector.", "model.connector.mlp."
NUM_LEFT_OUT = 1  # tokens that "default" leaves out in LLaVA, whatever its ViT puts before the patches


def is_llava(config: PreTrainedConfig) -> bool:
    """Whether a configuration is LLaVA's."""
    return config.model_type == LlavaConfig.model_type


def check_llava_head(given: str, config: Any) -> None:
    """Refuses an LLM whose configuration names maths of the head, which LLaVA leaves out and a vlmoe model computes.

    Raises:
        ValueError: naming the maths.
    """
    if named := list(head_maths(config.text_config)):
        raise ValueError(
            f"--vlm-model {given}: its LLM's configuration names maths of the head ({', '.join(named)}) that LLaVA "
            "leaves out and a vlmoe model would compute. Set these fields to null in its config.json."
        )


def check_dense_llava(given: str, config: Any) -> None:
    """A LLaVA that is upcycled is dense.

    Raises:
        ValueError: when its LLM is sparse, or has maths of the head.
    """
    if declared := sparse_fields(config.text_config):
        raise ValueError(
            f"--vlm-model {given} is a LLaVA whose LLM is already sparse: its {config.text_config.model_type} "
            f"configuration has {', '.join(declared)}. Only dense models are upcycled; keep its own experts: "
            "`vlmoe import --vlm-model ...`."
        )
    check_llava_head(given, config)


def vlmoe_fields(llava: Any, text: PreTrainedConfig) -> dict[str, Any]:
    """A LLaVA's configuration in the fields of `VLMoEConfig`.

    Args:
        llava: LLaVA's configuration.
        text: Its LLM's, dense; LLaVA's own says whether the head is tied to the embedding.
    """
    text = copy.deepcopy(text)
    text.tie_word_embeddings = llava.tie_word_embeddings
    return {
        "text_config": text.to_dict(),
        "vision_config": llava.vision_config.to_dict(),
        "image_token_id": llava.image_token_index,
        "vision_feature_layer": llava.vision_feature_layer,
        "vision_feature_select_strategy": llava.vision_feature_select_strategy,
        "vision_num_prefix_tokens": NUM_LEFT_OUT,
        "connector_hidden_act": llava.projector_hidden_act,
        "connector_bias": llava.multimodal_projector_bias,
        "tie_word_embeddings": llava.tie_word_embeddings,
    }


def name_in_vlmoe(name: str) -> str:
    """A LLaVA's tensor's name in a vlmoe model."""
    return CONNECTOR + name.removeprefix(PROJECTOR) if name.startswith(PROJECTOR) else name
