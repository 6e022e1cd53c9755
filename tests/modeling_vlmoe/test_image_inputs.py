"""ViTs that take images of any size: each image has as many tokens as the ViT gives features of it."""

import copy

import pytest
import torch
from transformers import AutoProcessor

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.blank_image import encode_nothing
from modeling_vlmoe.image_inputs import FORMS, ONE_SIZE, count_tokens, find_form, form_of_sizes
from tests import tiny
from tests.models import gap
from tests.variable_images import (
    SIZES,
    SPARSE_TOWERS,
    TOWERS,
    image_processor,
    pictures,
    processor,
    sparse_model,
    vision_model,
)

LIMIT = 1e-5


def inputs(family, rows=(2, 1), text="Is it red?", **kwargs):
    """A padded batch whose rows hold these numbers of images."""
    images = pictures()[: sum(rows)]
    given = [[images.pop(0) for _ in range(count)] for count in rows]
    texts = ["<image>a" * count + text * (index + 1) for index, count in enumerate(rows)]
    return processor(family)(text=texts, images=given, padding=True, padding_side="left", return_tensors="pt")


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_an_image_of_any_size_has_as_many_tokens_as_features(family):
    model, ours = sparse_model(family), processor(family)
    counts = []
    for size, picture in zip(SIZES, pictures(), strict=True):
        made = ours(text="<image>", images=picture, return_tensors="pt")
        num_tokens = int((made["input_ids"] == ours.image_token_id).sum())
        (features,) = model.get_image_features(
            **{key: made[key] for key in ("pixel_values", *model.model.image_form.arguments)}
        ).pooler_output
        assert len(features) == num_tokens
        asked = ours._get_num_multimodal_tokens(image_sizes=[size[::-1]])
        assert (asked.num_image_tokens, asked.num_image_patches) == ([num_tokens], [len(made["pixel_values"])])
        counts.append(num_tokens)
    assert len(set(counts)) > 2
    assert ours.count_image_tokens(pictures()) == sum(counts)
    together = ours(text="<image>" * len(SIZES), images=pictures(), return_tensors="pt")
    assert int((together["input_ids"] == ours.image_token_id).sum()) == sum(counts)


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_images_together_give_the_features_of_each_alone(family):
    model, ours = sparse_model(family), processor(family)

    def features(images):
        made = ours(text="<image>" * len(images), images=images, return_tensors="pt")
        made = {key: made[key] for key in ("pixel_values", *model.model.image_form.arguments)}
        return model.get_image_features(**made).pooler_output

    images = pictures()
    for alone, one in zip(images, features(images), strict=True):
        (wanted,) = features([alone])
        assert gap(one, wanted) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_the_connector_reads_the_features_of_the_tower_itself(family):
    """By the tower's own output: the count and the order of what is read, without our splitting."""
    model, dense = sparse_model(family, vision_moe=None), vision_model(family)
    dense.load_state_dict(model.model.vision_tower.state_dict())
    made = image_processor(family)(pictures(SIZES[:1]), return_tensors="pt")
    form = model.model.image_form
    outputs = dense(made["pixel_values"], **{form.arguments[k]: made[k] for k in form.arguments}, **HIDDEN)
    if "qwen" in family:
        wanted = outputs.pooler_output
    else:
        wanted = outputs.hidden_states[-2].reshape(-1, outputs.hidden_states[-2].shape[-1])
        wanted = wanted[made.get("pixel_attention_mask", torch.ones(1, len(wanted)))[0].bool()]
    got = model.get_image_features(**{key: made[key] for key in ("pixel_values", *form.arguments)}).pooler_output[0]
    assert gap(got, model.model.connector(wanted[None])[0][0]) <= LIMIT


HIDDEN = {"output_hidden_states": True}


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_a_batch_of_unequal_image_counts_gives_each_rows_logits(family):
    model, rows = sparse_model(family), (2, 0, 1)
    batch = inputs(family, rows)
    logits = model(**batch).logits
    images = pictures()
    for index, count in enumerate(rows):
        own = [images.pop(0) for _ in range(count)]
        text = "<image>a" * count + "Is it red?" * (index + 1)
        alone = processor(family)(text=[text], images=[own] if own else None, return_tensors="pt")
        length = alone["input_ids"].shape[1]
        assert gap(logits[index, -length:], model(**alone).logits[0]) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("family", TOWERS)
def test_generation_keeps_images_with_their_rows(family, options):
    model, rows = sparse_model(family), (2, 0, 1)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    together = model.generate(**inputs(family, rows), **options)
    images, kept = pictures(), options.get("num_return_sequences", 1)
    for index, count in enumerate(rows):
        own = [images.pop(0) for _ in range(count)]
        text = "<image>a" * count + "Is it red?" * (index + 1)
        alone = processor(family)(text=[text], images=[own] if own else None, return_tensors="pt")
        wanted = model.generate(**alone, **options)
        got = together[index * kept : (index + 1) * kept, -wanted.shape[1] :]
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", SPARSE_TOWERS)
def test_every_sparse_part_learns_and_comes_back(family, tmp_path):
    model, batch = sparse_model(family).train(), inputs(family)
    found = model(**batch, labels=batch["input_ids"], num_items_in_batch=batch["input_ids"].numel())
    assert set(found.router_losses) == {"text", "vision", "connector"}
    found.loss.backward()
    for part in ("vision_tower", "connector"):
        routers = [p for n, p in model.named_parameters() if part in n and n.endswith("router.weight")]
        assert routers
        assert all(router.grad.abs().max() > 0 for router in routers)
    model.eval().save_pretrained(tmp_path)
    processor(family).save_pretrained(tmp_path)
    loaded, again = VLMoEForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (again.image_sizes_name, again.num_image_tokens) == (model.model.image_form.sizes, None)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", TOWERS)
def test_nothing_is_encoded_as_zero(family):
    model = sparse_model(family)
    nothing = encode_nothing(model.model)
    assert nothing.item() == 0
    nothing.backward()
    assert model.model.connector.mlp.experts.down_proj.grad is not None
    assert any(parameter.grad is not None for parameter in model.model.vision_tower.parameters())


@pytest.mark.parametrize("family", TOWERS)
def test_every_key_that_the_processor_gives_is_named_by_forward(family):
    made = inputs(family)
    assert set(made) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        *find_form(type(vision_model(family))).arguments,
    }
    assert "pixel_values" not in processor(family)(text=["none"], return_tensors="pt")


def test_a_qwen_vit_is_read_behind_its_merger():
    model = sparse_model("qwen2_5_vl_vision")
    assert model.config.vision_feature_layer == -1
    assert model.config.vision_moe.layers == [1, 2]
    assert model.model.connector.mlp.experts.up_proj.shape[-1] == 20
    assert sparse_model("pixtral").config.vision_feature_layer == -2


def test_forms_are_told_apart_by_what_forward_takes():
    found = {family: find_form(type(vision_model(family))).name for family in TOWERS}
    assert found == {
        "pixtral": "padded images",
        "siglip2_vision_model": "padded patches",
        "qwen2_5_vl_vision": "packed patches",
        "qwen3_vl_vision": "packed patches",
        "qwen3_5_vision": "packed patches",
    }
    assert find_form(type(tiny.vision_model("clip"))) is ONE_SIZE
    assert all(form_of_sizes(form.sizes) is form for form in FORMS)
    assert (
        count_tokens([(1, 4, 6), (2, 2, 2)], side=2) == count_tokens(torch.tensor([[1, 4, 6], [2, 2, 2]]), 2) == [6, 2]
    )


# Mutants and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("family", TOWERS)
def test_raises_when_the_processor_counts_otherwise(family):
    other = processor(family)
    other.image_token_side *= 2
    with torch.no_grad(), pytest.raises(ValueError, match=r"The text holds \d+ image tokens .* give \d+ features"):
        sparse_model(family)(**other(text="<image>", images=pictures(SIZES[:1]), return_tensors="pt"))


@pytest.mark.parametrize("family", TOWERS)
def test_raises_when_sizes_are_missing(family):
    made = inputs(family)
    for key in find_form(type(vision_model(family))).arguments:
        made.pop(key)
    with pytest.raises(
        ValueError, match=r"The vision tower takes .*: expected pixel_values, .*; given: pixel_values\."
    ):
        sparse_model(family)(**made)


def test_raises_when_sizes_are_given_to_a_tower_of_one_size():
    from tests.models import batch
    from tests.models import sparse_model as one_size

    with pytest.raises(ValueError, match=r"takes images of one size: expected pixel_values; given: .*image_sizes"):
        one_size()(**batch(), image_sizes=torch.tensor([[24, 24]] * 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_feature_layer": -2}, "merges patches behind its last layer"),
        ({"vision_feature_layer": [-1, -2]}, "merges patches behind its last layer"),
        ({"vision_feature_select_strategy": "default"}, "takes images of any size and puts no token before"),
    ],
    ids=str,
)
def test_raises_when_features_are_chosen_that_there_are_not(fields, message):
    with pytest.raises(ValueError, match=message):
        sparse_model("qwen2_5_vl_vision", **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_feature_layer": -2}, r"vision_feature_layer is \[-2\], but a qwen2_5_vl_vision is read behind"),
        ({"vision_feature_select_strategy": "default"}, "takes images of any size and puts no token before"),
    ],
    ids=str,
)
def test_raises_when_a_call_asks_for_other_features(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_model("qwen2_5_vl_vision")(**inputs("qwen2_5_vl_vision"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_image_tokens": 4}, "num_image_tokens is 4 .expected None."),
        ({"image_token_side": None}, "image_token_side is None .expected a whole number"),
        ({"image_token_side": 0}, "image_token_side is 0"),
        ({"image_sizes_name": "size"}, "No ViT takes images' sizes as 'size'; expected one of 'image_grid_thw'"),
        ({"image_sizes_name": None}, "image_token_side is 4, but images have no sizes"),
    ],
    ids=str,
)
def test_raises_when_it_is_unknown_how_many_tokens_an_image_takes(changes, message):
    given = {"num_image_tokens": None, "image_sizes_name": "image_sizes", "image_token_side": PATCH_SIDE} | changes
    with pytest.raises(ValueError, match=message):
        processor("pixtral").from_parents(image_processor("pixtral"), tiny.tokenizer(), **given)


PATCH_SIDE = 4


def test_raises_when_the_image_processor_gives_no_sizes():
    ours = copy.copy(processor("pixtral"))
    ours.image_processor = tiny.image_processor("siglip")
    with pytest.raises(ValueError, match=r"SiglipImageProcessorPil gives no image_sizes beside the pixel values"):
        ours(text="<image>", images=pictures(SIZES[:1]), return_tensors="pt")
