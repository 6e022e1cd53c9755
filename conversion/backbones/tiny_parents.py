"""Tiny dense parents of any family, as folders that a user would have downloaded.

Every parameter is redrawn wide, because a freshly initialised model hides mistakes: zeroing all MLP biases of a fresh
tiny SigLIP moves its features by 2e-6 only.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from modeling_vlmoe.image_inputs import find_form, patch_frames

from .families import TEXT_TABLES, VISION_TABLES, registered_class
from .tiny_configs import IMAGE_SIZE, PATCH_SIZE, VOCABULARY, tiny_config

STD = 0.2
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
MOST_PARAMETERS = 40_000_000  # more means that a size of the configuration has another name
TABLES = {"text": TEXT_TABLES, "vision": VISION_TABLES}
# The other parent, whatever the one that is measured.
PARTNERS = {"text": "siglip_vision_model", "vision": "llama"}
UNKNOWN, IMAGE, PAD = "<unk>", "<image>", "<pad>"


@torch.no_grad()
def redraw(model: Any, seed: int = 0) -> Any:
    """Redraws every parameter so that each of them matters to the output; norm weights stay around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * STD
        is_norm_weight = "norm" in name.lower() and name.endswith("weight")
        parameter.copy_(noise + 1.0 if is_norm_weight else noise)
    return model


def build_parent(family: str, part: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny dense model of a family, in its own class, redrawn.

    Raises:
        ValueError: when it is not tiny.
    """
    config = tiny_config(family, part, **fields)
    model_class = registered_class(family, TABLES[part])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"The tiny {family} has {size:,} parameters, expected {MOST_PARAMETERS:,} at most: its configuration "
            "names sizes by names that are not known here."
        )
    return redraw(model_class._from_config(config).float(), seed).eval()


def tokenizer() -> Any:
    """A tokenizer of as many words as the tiny vocabulary has."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, "<s>", "</s>", UNKNOWN, IMAGE, *(f"w{number}" for number in range(VOCABULARY - 5))]
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": PAD, "bos_token": "<s>", "eos_token": "</s>", "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=fast, additional_special_tokens=[IMAGE], **special)


def image_processor(tower: Any) -> Any:
    """One that gives what a tower takes, of pictures of the tiny size."""
    form = find_form(type(tower))
    if form.sizes == "image_grid_thw":
        return transformers.Qwen2VLImageProcessorPil(
            patch_size=PATCH_SIZE,
            merge_size=getattr(tower.config, form.side or "", 2),  # by 2, also where the connector merges
            temporal_patch_size=patch_frames(tower.config),
            size={"shortest_edge": IMAGE_SIZE**2, "longest_edge": IMAGE_SIZE**2},
        )
    if form.sizes == "spatial_shapes":
        return transformers.Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=NUM_PATCHES)
    if form.sizes == "image_sizes":
        patch = {"height": PATCH_SIZE, "width": PATCH_SIZE}
        return transformers.PixtralImageProcessorPil(size={"longest_edge": IMAGE_SIZE}, patch_size=patch)
    return transformers.SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def save_parent(model: PreTrainedModel, part: str, folder: Path) -> Path:
    """Writes a dense parent as a Hub folder has it, under the names of its class."""
    model.save_pretrained(folder, save_original_format=False)
    companion = tokenizer() if part == "text" else image_processor(model)
    companion.save_pretrained(folder)
    return folder


def save_partner(part: str, folder: Path) -> Path:
    """Writes the other parent for one of this part."""
    other = "vision" if part == "text" else "text"
    return save_parent(build_parent(PARTNERS[part], other, seed=1), other, folder)
