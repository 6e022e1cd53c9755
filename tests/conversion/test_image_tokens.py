"""What the processor writes for an image is what the ViT makes of it, whatever the ViT's size and the picture's."""

import pytest
import torch
from PIL import Image

from modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from tests import tiny

PICTURES = [(40, 30), (8, 8), (300, 11), (11, 300), (24, 24)]  # width, height


def save_vision_parent(folder, family, size):
    """A ViT for another image size, with an image processor for that size."""
    tiny.vision_model(family, image_size=size).save_pretrained(folder)
    processor = tiny.image_processor(family)
    square = {"height": size, "width": size}
    processor.size = {"shortest_edge": size} if family == "clip" else square
    if family == "clip":
        processor.crop_size = square
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
@pytest.mark.parametrize("size", [16, 32, 36], ids=str)  # 36 is no multiple of the patch: the ViT leaves a rim out
@torch.no_grad()
def test_an_image_takes_as_many_tokens_as_the_vit_gives_features(parents, tmp_path, family, size, strategy):
    vision = save_vision_parent(tmp_path / "vision", family, size)
    out = upcycle(
        UpcycleArguments(
            text_model=str(parents / "llama"),
            vision_model=str(vision),
            output_dir=str(tmp_path / "out"),
            vision_feature_select_strategy=strategy,
            dense=True,
        )
    )
    processor = VLMoEProcessor.from_pretrained(out)
    model = VLMoEForConditionalGeneration.from_pretrained(out)
    pictures = [Image.new("RGB", size) for size in PICTURES]
    inputs = processor(text="<image>" * len(pictures), images=pictures, return_tensors="pt")
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    num_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert num_tokens == sum(len(one) for one in features) == len(pictures) * processor.num_image_tokens
    asked = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in PICTURES])
    assert asked.num_image_tokens == [len(one) for one in features]
    model(**inputs)
