"""A tiny dense VLM of any family: its own class, with the sizes that its parts' configurations name made small."""

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .families import VLM_TABLES, config_class, registered_class
from .tiny_configs import FAMILY_FIELDS, IMAGE_SIZE, NUM_LAYERS, PATCH_SIZE, SIZES, TEXT_SIZES, VOCABULARY
from .tiny_parents import MOST_PARAMETERS, redraw

# What the part of a VLM's configuration is called that holds an LLM; all others are ViTs, or sized like them.
TEXT_PARTS = ("text_config", "qformer_config", "decoder")
SECTIONS = "mrope_section"
MROPE = {"rope_type": "default", "rope_theta": 1e4, SECTIONS: [1, 1, 2]}  # of the half of a head
# The ViT is wider than the LLM, so that what maps into the LLM is told from what does not.
WIDTH = 2 * TEXT_SIZES["hidden_size"]
WIDE = {"hidden_size": WIDTH, "embed_dim": WIDTH, "num_attention_heads": 8, "num_heads": 8}
VISION = "vision_config"
# The word that stands for an image, and what the configuration of the whole calls it.
IMAGE_TOKEN, IMAGE_TOKENS = 4, ("image_token_id", "image_token_index")
NUM_TILES = 2  # that an image is cut into, side by side
FINE_SIZE = 2 * IMAGE_SIZE  # of the image that a second ViT reads beside the first (DeepSeek-VL's hybrid)
BART_SIZES = {"layers": NUM_LAYERS, "attention_heads": 4, "ffn_dim": 48}
CODES = 64  # of the images of a VLM that reads them as words
WORDS_OF_IMAGES = {"<image>": IMAGE_TOKEN, "<|extra_200|>": IMAGE_TOKEN + 1} | {
    f"<|visual token {code:06}|>": VOCABULARY - CODES + code for code in range(CODES)
}
SLIM_VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}
BART = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIZES.items()}
IN_SECTIONS = {"text_config": {"rope_parameters": MROPE}}  # heads are cut, by sizes that no configuration names
# What the parts of a family need beside, or otherwise.
VLM_FIELDS: dict[str, dict[str, dict[str, Any]]] = {
    "blip": {"text_config": {"encoder_hidden_size": WIDTH}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"image_size": FINE_SIZE}},
    "emu3": {
        "vq_config": SLIM_VQ
        | {"codebook_size": CODES, "embed_dim": 4, "hidden_size": 32, "num_attention_heads": 1, "attn_resolutions": []}
    },
    "florence2": {
        VISION: {
            "depths": [1, 1, 1, 1],
            "patch_size": [7, 3, 3, 3],
            "patch_stride": [2, 2, 2, 2],
            "embed_dim": [16, 16, 32, WIDTH],
            "num_heads": [2, 2, 4, 8],
            "num_groups": [2, 2, 4, 8],
            "window_size": 2,
            "projection_dim": TEXT_SIZES["hidden_size"],
        },
        "text_config": BART,
    },
    "gemma4_unified": {
        VISION: {"pooling_kernel_size": 1, "mm_embed_dim": WIDTH, "output_proj_dims": WIDTH, "mm_posemb_size": 16}
    },
    "glm46v": IN_SECTIONS,
    "glm4v": IN_SECTIONS,
    "glm_ocr": IN_SECTIONS,
    "glmga": IN_SECTIONS,
    "granite4_vision": {"text_config": {"num_hidden_layers": 6}},
    "hunyuan_vl": IN_SECTIONS,
    "idefics2": {"perceiver_config": {"resampler_n_latents": 4}},
    "janus": {
        VISION: {"projection_dim": TEXT_SIZES["hidden_size"], "depth": 2},
        "vq_config": SLIM_VQ
        | {"num_embeddings": CODES, "latent_channels": 32, "num_patches": 4, "projection_dim": 32}
        | {"image_token_embed_dim": TEXT_SIZES["hidden_size"]},
    },
    "mllama": {VISION: {"intermediate_layers_indices": [1, 2], "vision_output_dim": 3 * WIDTH}},
    "molmo2": {
        VISION: {"image_size": [IMAGE_SIZE, IMAGE_SIZE], "num_key_value_heads": 8},
        "adapter_config": {
            "num_key_value_heads": 8,
            "text_hidden_size": TEXT_SIZES["hidden_size"],
            "vision_feature_layer": [3, 1],
        },
    },
    "ovis2": {VISION: {"vocab_size": VOCABULARY}},
    "paddleocr_vl": IN_SECTIONS,
    "pp_formulanet": {
        VISION: {
            "global_attn_indexes": [1, 3],
            "window_size": 2,
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 16,
            "post_conv_out_channels": 16,
            "decoder_hidden_size": TEXT_SIZES["hidden_size"],
        },
        "text_config": BART,
    },
    "qwen2_5_omni_thinker": IN_SECTIONS,
    "qwen2_5_vl": IN_SECTIONS,
    "qwen2_vl": IN_SECTIONS | {VISION: {"hidden_size": TEXT_SIZES["hidden_size"]}},  # embed_dim is the ViT's
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
}
TILED = {"image_grid_pinpoints": [[IMAGE_SIZE, NUM_TILES * IMAGE_SIZE]]}
# What the whole of a family needs, so that its images can be read.
ROOT_FIELDS: dict[str, dict[str, Any]] = {
    "emu3": {"vocabulary_map": WORDS_OF_IMAGES},
    "fuyu": {"patch_size": PATCH_SIZE},
    "gemma3": {"mm_tokens_per_image": 4},
    "granite4_vision": TILED
    | {"downsample_rate": "1/2", "deepstack_layer_map": [[1, 0], [2, 1]], "spatial_target_layers": [2, 3, 4, 5]},
    "instructblipvideo": {"video_token_index": IMAGE_TOKEN},
    "llava_next": TILED,
    "llava_next_video": TILED,
    "llava_onevision": TILED,
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH, "projector_hidden_size": 48},
    "ovis2": {"hidden_size": TEXT_SIZES["hidden_size"]},
    "paligemma": {"projection_dim": TEXT_SIZES["hidden_size"]},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-2, -3]},
}


def names_sections(rope: Any) -> bool:
    """Whether the settings of rotary positions cut a head into sections of time, height and width."""
    return isinstance(rope, dict) and SECTIONS in rope


def parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configurations inside another, by the names of their fields."""
    made: dict[str, PreTrainedConfig] = {}
    for name, part_class in (config.sub_configs or {}).items():
        part: Any = getattr(config, name, None)
        if part is None and name == VISION:  # Gemma-4 leaves its ViT out where none is named
            part = part_class()
        if part is not None:
            made[name] = part
    return made


def part_fields(name: str, part: PreTrainedConfig) -> dict[str, Any]:
    """The sizes that one part's configuration names, small."""
    sizes = SIZES["text"] if name in TEXT_PARTS else SIZES["vision"] | WIDE
    own = FAMILY_FIELDS.get(part.model_type, {})
    known = set(part.to_dict()) | set(part.attribute_map)
    fields = {field: value for field, value in sizes.items() if field in known} | own
    if names_sections(getattr(part, "rope_parameters", None)):
        fields["rope_parameters"] = dict(MROPE)
    kept = {field: value for field, value in fields.items() if value is not None}
    kept |= {inner: part_fields(inner, one) for inner, one in parts_of(part).items()}
    return kept | ({"model_type": part.model_type} if part.model_type else {})


def tiny_vlm_config(family: str) -> PreTrainedConfig:
    """A tiny configuration of a family of VLMs."""
    made: Any = config_class(family)()
    fields: dict[str, Any] = {name: IMAGE_TOKEN for name in IMAGE_TOKENS if hasattr(made, name)}
    for name, part in parts_of(made).items():
        fields[name] = part_fields(name, part) | VLM_FIELDS.get(family, {}).get(name, {})
    return config_class(family)(**(fields | ROOT_FIELDS.get(family, {})))


def build_vlm(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny dense VLM, redrawn.

    Raises:
        ValueError: when it is not tiny.
    """
    model_class = registered_class(family, VLM_TABLES)
    with torch.device("meta"):
        size = sum(one.numel() for one in model_class._from_config(tiny_vlm_config(family)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"the tiny {family} has {size:,} parameters, expected {MOST_PARAMETERS:,} at most: its configuration "
            "names sizes by names that are not known here"
        )
    return redraw(model_class._from_config(tiny_vlm_config(family)).float(), seed).eval()
