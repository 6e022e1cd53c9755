"""Ten LLMs with six ViTs, all parts sparse: an image and text go in, generation with a cache, saving and loading."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from modeling_vlmoe.conversion.backbones.tiny_configs import IMAGE_SIZE, PATCH_SIZE, tiny_config
from modeling_vlmoe.conversion.backbones.tiny_parents import redraw
from modeling_vlmoe.text_head import find_head
from tests.models import ALL_SPARSE, gap

TEXT = ("llama", "gpt2", "bloom", "falcon", "mpt", "opt", "phi", "gemma2", "apertus", "lfm2")
VISION = ("siglip_vision_model", "dinov2", "aimv2_vision_model", "dpt", "sam_vision_model", "vit_msn")
# A sample in which each is once; the others are slow for their number.
FEW = {(text, VISION[number % len(VISION)]) for number, text in enumerate(TEXT)}
PAIRS = [
    pytest.param(text, vision, marks=() if (text, vision) in FEW else pytest.mark.slow)
    for text in TEXT
    for vision in VISION
]
GREEDY = {"do_sample": False, "pad_token_id": 0, "suppress_tokens": [300]}  # an image token would want an image
IMAGE_TOKEN, NUM_PATCHES = 300, (IMAGE_SIZE // PATCH_SIZE) ** 2


def model(text, vision, **fields):
    config = VLMoEConfig(
        text_config=tiny_config(text, "text"),
        vision_config=tiny_config(vision, "vision"),
        image_token_id=IMAGE_TOKEN,
        **(ALL_SPARSE | fields),
    )
    return redraw(VLMoEForConditionalGeneration(config)).eval()


def inputs(num_rows=2):
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(6, 290, (num_rows, 7), generator=generator)
    image = torch.full((num_rows, NUM_PATCHES), IMAGE_TOKEN)
    ids = torch.cat([words[:, :3], image, words[:, 3:]], dim=1)
    pixels = torch.randn(num_rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize(("text", "vision"), PAIRS)
@torch.no_grad()
def test_image_and_text_go_through_generate_and_a_folder(tmp_path, text, vision):
    made, given = model(text, vision), inputs()
    logits = made(**given).logits
    assert logits.isfinite().all()
    other = given | {"pixel_values": given["pixel_values"].flip(0)}
    assert gap(made(**other).logits, logits) > 1e-3, "the image does not matter"

    settings = {"max_new_tokens": 5, "min_new_tokens": 5, **GREEDY}
    cached = made.generate(**given, **settings)
    assert torch.equal(cached, made.generate(**given, **settings, use_cache=False))

    made.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert gap(loaded(**given).logits, logits) <= 1e-5


@pytest.mark.parametrize(
    "text", ["openai-gpt", "recurrent_gemma", "ctrl", "gpt_neox_japanese", "falcon_h1", "bamba", "xlstm"]
)
@torch.no_grad()
def test_llms_that_keep_no_usual_cache_generate_the_same(text):
    made, given = model(text, VISION[0]), inputs()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, **GREEDY}
    assert torch.equal(made.generate(**given, **settings), made.generate(**given, **settings, use_cache=False))


@pytest.mark.parametrize("text", TEXT)
def test_router_losses_reach_every_router(text):
    made, given = model(text, VISION[4]).train(), inputs()
    outputs = made(**given, labels=given["input_ids"], output_router_logits=True)
    num_layers = len(made.config.text_moe.layers)
    assert outputs.router_losses["text"].shape == (num_layers, 2)
    assert len(outputs.router_logits) == num_layers
    assert outputs.router_losses["vision"].shape == (len(made.config.vision_moe.layers), 2)
    outputs.loss.backward()
    routers = [parameter for name, parameter in made.named_parameters() if "router" in name]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in routers)


def test_raises_when_checkpointing_would_lose_router_losses():
    made, given = model("bloom", VISION[0], vision_moe=None, connector_moe=None).train(), inputs()
    made.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="SparseBloomBlock is given no keywords by its tower"):
        made(**given, labels=given["input_ids"])
    made.config.text_moe.router_aux_loss_coef = made.config.text_moe.router_z_loss_coef = 0.0
    made(**given, labels=given["input_ids"]).loss.backward()


def test_a_head_that_is_no_linear_is_refused_by_name():
    from modeling_vlmoe.conversion.backbones.tiny_parents import build_parent

    with pytest.raises(ValueError, match=r"computes its logits with lm_head\.dense\.weight"):
        find_head(build_parent("modernbert-decoder", "text"))
