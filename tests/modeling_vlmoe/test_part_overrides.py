"""`from_pretrained` overrides what leaves the weights as they are, and refuses the rest, alike in both forms."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from modeling_vlmoe import VLMoEForConditionalGeneration
from tests.modeling_vlmoe.test_in_place import model
from tests.models import sparse_model

VISION_LAYERS = {"composite": [1, 2], "hosted": [2, 3]}


@pytest.fixture(scope="module", params=VISION_LAYERS)
def saved(request, tmp_path_factory):
    """A form, and a folder of it with experts in every part."""
    folder = tmp_path_factory.mktemp(request.param)
    made = sparse_model() if request.param == "composite" else model("qwen2_5_vl")
    made.save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("loader", [AutoModelForImageTextToText, VLMoEForConditionalGeneration])
@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("text", {"num_experts_per_tok": 1}),
        ("text", {"router_aux_loss_coef": 0.5, "norm_topk_prob": False}),
        ("text", {"num_experts": 4, "layers": [0, 1, 2]}),  # what is there
        ("vision", {"router_z_loss_coef": 0.2}),
        ("connector", {"num_experts_per_tok": 3}),
    ],
    ids=str,
)
def test_what_leaves_the_weights_alone_is_overridden(saved, loader, part, fields):
    _, folder = saved
    stored = AutoConfig.from_pretrained(folder).moe(part).to_dict()
    loaded, info = loader.from_pretrained(folder, **{f"{part}_moe": fields}, output_loading_info=True)
    assert loaded.config.moe(part).to_dict() == stored | fields
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("loader", [AutoModelForImageTextToText, AutoModel, VLMoEForConditionalGeneration])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_moe": None}, r"text_moe is None, but in .* the text part has 4 experts in layers \[0, 1, 2\]"),
        ({"vision_moe": None}, "vision_moe is None, but in .* the vision part has 4 experts in layers"),
        ({"connector_moe": None}, "connector_moe is None, but in .* the connector part has 4 experts"),
        ({"text_moe": {"num_experts": 8}}, r"text_moe\.num_experts is 8, but in .* it is 4"),
        ({"text_config": {"num_experts": 8}}, r"text_moe\.num_experts is 8, but in .* it is 4"),
        ({"text_moe": {"layers": [0]}}, r"text_moe\.layers is \[0\], but in .* it is \[0, 1, 2\]"),
        ({"text_moe": {"moe_intermediate_size": 7}}, r"text_moe\.moe_intermediate_size is 7, but in .* it is 48"),
        ({"text_moe": {"num_shared_experts": 1}}, r"text_moe\.num_shared_experts is 1, but in .* it is 0"),
        ({"vision_moe": {"layers": [1]}}, r"vision_moe\.layers is \[1\], but in"),
    ],
    ids=str,
)
def test_raises_when_an_override_does_not_fit_the_weights(saved, loader, fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*[Ll]eave it out.*`vlmoe upcycle`"):
        loader.from_pretrained(saved[1], **fields)


def test_raises_when_a_dense_part_is_to_have_experts(tmp_path):
    for made in (sparse_model(vision_moe=None), model("qwen2_5_vl", vision_moe=None)):
        folder = tmp_path / type(made).__name__
        made.save_pretrained(folder)
        with pytest.raises(ValueError, match=r"vision_moe is given, but in .* the vision part is dense"):
            AutoModelForImageTextToText.from_pretrained(folder, vision_moe={"num_experts": 4})


def test_raises_when_a_changed_configuration_does_not_fit_the_weights(saved):
    form, folder = saved
    config = AutoConfig.from_pretrained(folder)
    config.vision_moe = None
    layers = VISION_LAYERS[form]
    with pytest.raises(ValueError, match=f"vision_moe is None.*4 experts in layers {layers}".replace("[", r"\[")):
        AutoModelForImageTextToText.from_pretrained(folder, config=config)


@torch.no_grad()
def test_a_state_dict_of_ones_own_is_not_compared_with_a_folder(saved):
    _, folder = saved
    config = AutoConfig.from_pretrained(folder)
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    again = VLMoEForConditionalGeneration.from_pretrained(None, config=config, state_dict=whole.state_dict())
    assert all(torch.equal(again.get_parameter(name), value) for name, value in whole.named_parameters())
