"""A LLaVA read as a vlmoe model."""

import copy
from typing import Any

from transformers import PreTrainedConfig


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
        "connector_hidden_act": llava.projector_hidden_act,
        "connector_bias": llava.multimodal_projector_bias,
        "tie_word_embeddings": llava.tie_word_embeddings,
    }
