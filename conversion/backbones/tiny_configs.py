"""A tiny configuration of any family: its own class, with the sizes that it names made small.

Sizes are set by the names that configurations use for them. What a family needs beside that is a row of its own.
"""

from typing import Any

from transformers import PreTrainedConfig

from .families import config_class

NUM_LAYERS = 4  # patterns of unlike layers repeat after four or fewer
VOCABULARY = 320
IMAGE_SIZE, PATCH_SIZE = 32, 8

# What the sizes of a text configuration are called; a name that its class does not have is left out.
TEXT_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_layers": NUM_LAYERS,
    "n_layer": NUM_LAYERS,
    "n_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Mixers beside attention.
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "lru_width": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # Experts, of families that have them.
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
VISION_SIZES: dict[str, Any] = {
    "temporal_patch_size": 2,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "mlp_dim": 48,
    "num_hidden_layers": NUM_LAYERS,
    "depth": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "head_dim": 8,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "projection_dim": 16,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0, 2],
    "output_channels": 16,
}
SIZES = {"text": TEXT_SIZES, "vision": VISION_SIZES}
# What a family needs beside, or otherwise; None takes the class's own default.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "head_dim": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        },
    },
    "ctrl": {"dff": 48},
    "exaone4_5_vision": {"num_key_value_heads": 4},
    "falcon_h1": {"mlp_multipliers": [0.7, 1.3]},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * NUM_LAYERS,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
        "global_head_dim": 8,
        "num_experts": None,
        "num_experts_per_tok": None,
        "moe_intermediate_size": None,
    },
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    "hunyuan_vl_vision": {"temporal_patch_size": 1},
    "hyperclovax": {"logits_scaling": 3.0},
    "lw_detr_vit": {"num_windows": 4, "window_block_indices": [0, 2]},
    "mamba2": {"num_heads": 8},
    "mgp-str": {"image_size": [IMAGE_SIZE, IMAGE_SIZE]},
    "gemma4_vision": {"num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 64},
    "inkling2_vision": {"posemb_grid_size": 4, "projection_hidden_dim": 48, "text_hidden_size": 32},
    "lfm3_vl_vision": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 16},
    "mpt": {"no_bias": True},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48,
        "attention_head_size": 8,
    },
    "trocr": {"decoder_layers": NUM_LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "xlnet": {"d_inner": 48},
    "xlstm": {"hidden_size": 128, "num_heads": 2, "qk_dim_factor": 1.0},
    "yolos": {"image_size": [IMAGE_SIZE, IMAGE_SIZE]},
    "youtu": {"num_key_value_heads": 4},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * (NUM_LAYERS // 2)},
    # The patch's length in frames has another name.
    "vivit": {"tubelet_size": [2, PATCH_SIZE, PATCH_SIZE], "num_frames": 4},
}


def own_fields(family: str, part: str) -> dict[str, Any]:
    """The sizes that a family's configuration names."""
    made = config_class(family)
    known = set(made().to_dict()) | set(made.attribute_map)
    sizes = {name: value for name, value in SIZES[part].items() if name in known}
    return {name: value for name, value in (sizes | FAMILY_FIELDS.get(family, {})).items() if value is not None}


def tiny_config(family: str, part: str, **fields: Any) -> PreTrainedConfig:
    """A tiny configuration of a family.

    Args:
        family: its model type.
        part: "text" or "vision".
        fields: more of its fields.
    """
    return config_class(family)(**(own_fields(family, part) | fields))
