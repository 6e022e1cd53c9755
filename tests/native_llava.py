"""A vlmoe model of a sparse Qwen3, and what `vlmoe export` makes of it: LLaVA with a Qwen3-MoE inside."""

import tempfile
from pathlib import Path

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.conversion import ExportArguments, export
from tests.models import EXPERTS, processor, sparse_model


def vlmoe_model(**fields) -> VLMoEForConditionalGeneration:
    """Sparse in the LLM alone, with the processor's image token; it answers in letters, up to the limit."""
    ours = processor()
    image_token_id = ours.image_token_id
    parts = {"text_moe": EXPERTS, "vision_moe": None, "connector_moe": None, "image_token_id": image_token_id}
    model = sparse_model("qwen3", "siglip", **(parts | fields))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # Bytes that are no characters would come out differently whole and in pieces.
    others = [
        id
        for id in range(model.config.text_config.vocab_size)
        if not ours.tokenizer.decode([id], skip_special_tokens=True).isalpha()
    ]
    model.generation_config.suppress_tokens = others
    return model


def save_vlmoe(folder: Path, **fields) -> Path:
    vlmoe_model(**fields).save_pretrained(folder)
    processor().save_pretrained(folder)
    return Path(folder)


def save_native(folder: Path) -> Path:
    """The same model, exported."""
    with tempfile.TemporaryDirectory() as source:
        return export(ExportArguments(checkpoint=str(save_vlmoe(Path(source))), output_dir=str(folder)))
