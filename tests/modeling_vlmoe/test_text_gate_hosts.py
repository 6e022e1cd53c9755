"""The text gate in VLMs of transformers that are sparse in place."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEConfig
from modeling_vlmoe.host_images import check_known, for_host
from modeling_vlmoe.text_gate import TextGate
from tests import hosts, tiny
from tests.modeling_vlmoe.text_gates import GATE, answers, leaks, replaced

OTHERS = ["qwen2_vl", "qwen3_vl", "qwen3_5", "mistral3", "gemma3"]
FAMILIES = ["qwen2_5_vl", "internvl", *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]
COUNTS = (1, 2)
KEPT = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "do_sample": False}


def model(family, **fields):
    parts = {"vision_moe": dict(GATE)} | ({"connector_moe": dict(GATE)} if hosts.HOSTS[family].has_connector else {})
    values = hosts.config(family).to_dict() | {"body_model_type": family} | parts | fields
    return tiny.redraw(AutoModelForImageTextToText.from_config(VLMoEConfig.from_dict(values)), std=0.3).eval()


def given(family, num_images=COUNTS, **options):
    """A batch whose last three words are the assistant's."""
    made = hosts.inputs(hosts.processor(family), family, num_images, **options)
    config = hosts.config(family)
    image = next(value for name in ("image_token_id", "image_token_index") if (value := getattr(config, name, None)))
    ids = made["input_ids"]
    marks = torch.where(ids == image, 1, 3) * made["attention_mask"]
    marks[:, -3:] = 0
    return made | {"mm_token_type_ids": marks}


def image_logits(made, batch):
    """What routers gave for the connector's tokens, or those of the last layer of the ViT."""
    outputs = made(**batch, output_router_logits=True)
    return (outputs.get("connector_router_logits") or outputs.vision_router_logits)[-1]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_routed_by_the_question_and_by_no_answer(family):
    made, batch = model(family), given(family)
    before = image_logits(made, batch)
    assert torch.equal(before, image_logits(made, replaced(batch, answers(batch))))
    where = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    words = (batch["mm_token_type_ids"][0] == 3) & (batch["input_ids"][0] >= 5) & (batch["input_ids"][0] < 290)
    where[0, words.nonzero()[-1]] = True
    after = image_logits(made, replaced(batch, where))
    changed = (before != after).any(1)
    placeholders = (batch["mm_token_type_ids"] == 1).sum(1)  # Gemma-3 pools several tokens of its ViT into one
    first = len(before) * int(placeholders[0]) // int(placeholders.sum())
    assert changed[:first].all()  # those of the first row
    assert not changed[first:].any()


def test_no_answer_reaches_an_earlier_logit():
    assert not leaks(model("qwen2_5_vl"), given("qwen2_5_vl"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_batch_generates_what_its_singles_generate(family, kwargs):
    untiled = {tiles: False} if (tiles := hosts.HOSTS[family].tiles) else {}
    made, together = model(family), given(family, **untiled)
    whole = made.generate(**together, **(KEPT | kwargs))[:, together["input_ids"].shape[1] :]
    for row in range(len(COUNTS)):
        alone = single(family, together, row)
        found = made.generate(**alone, **(KEPT | kwargs))[:, alone["input_ids"].shape[1] :]
        assert torch.equal(found[0], whole[row])


def single(family, batch, row):
    """One row of a batch, without its padding."""
    real = batch["attention_mask"][row].bool()
    alone = {name: batch[name][row, real][None] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    images = slice(sum(COUNTS[:row]), sum(COUNTS[: row + 1]))
    if (sizes := batch.get("image_grid_thw")) is None:
        return alone | {"pixel_values": batch["pixel_values"][images]}
    patches = sizes.prod(1).cumsum(0).tolist()
    start = [0, *patches][images.start]
    return alone | {
        "image_grid_thw": sizes[images],
        "pixel_values": batch["pixel_values"][start : patches[images.stop - 1]],
    }


@torch.no_grad()
def test_the_hosts_positions_do_not_take_text_for_images():
    family = "qwen2_5_vl"
    made, batch = model(family), given(family)
    for gate in (one for one in made.modules() if isinstance(one, TextGate)):
        gate.readout.zero_()
    marks = (batch["mm_token_type_ids"] == 1).long()
    kept = {name: one for name, one in made.state_dict().items() if "text_gate" not in name}
    plain = model(family, **{name: {"num_experts": 4} for name in ("vision_moe", "connector_moe")})
    plain.load_state_dict(kept)
    assert torch.equal(made(**batch).logits, plain(**batch | {"mm_token_type_ids": marks}).logits)
    tokens = made.generate(**batch, **KEPT)
    assert torch.equal(tokens, plain.generate(**batch | {"mm_token_type_ids": marks}, **KEPT))


def test_the_gate_is_trained_with_checkpointing():
    family = "qwen2_5_vl"
    made, batch = model(family).train(), given(family)
    made.activation_checkpointing_enable()
    made(**batch, labels=batch["input_ids"]).loss.backward()
    gates = [one for name, one in made.named_parameters() if "text_gate" in name]
    assert gates
    assert all(one.grad.abs().sum() > 0 for one in gates)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "idefics3"])
def test_raises_when_images_are_cut_into_tiles(family):
    with pytest.raises(ValueError, match="hold tiles, not one row for each image"):
        model(family)(**given(family))


def test_raises_when_images_come_without_marks():
    family = "qwen2_5_vl"
    made, batch = model(family), given(family)
    batch["mm_token_type_ids"] = (batch["mm_token_type_ids"] == 1).long()
    for run in (made, made.generate):
        with pytest.raises(ValueError, match="marks none"):
            run(**batch)


def test_raises_when_a_video_is_given():
    family = "qwen2_5_vl"
    made, batch = model(family), given(family)
    batch["pixel_values_videos"] = batch["pixel_values"]
    with pytest.raises(ValueError, match="a video is given"):
        made(**batch)


def test_raises_when_the_text_has_an_encoder_of_its_own():
    made = hosts.model("qwen2_5_vl")
    made.config = model("qwen2_5_vl").config
    made.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="its text goes through an encoder of its own"):
        check_known(made)


def test_raises_when_a_tower_without_keywords_is_checkpointed():
    family = "internvl"
    made, batch = model(family).train(), given(family)
    made.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="its router would not know what it reads beside the token"):
        made(**batch)


def test_marks_of_a_model_without_a_gate_are_its_own():
    made = model("qwen2_5_vl", vision_moe={"num_experts": 4}, connector_moe=None)
    marks = {"mm_token_type_ids": torch.tensor([[0, 1, 2, 3]])}
    assert for_host(made, marks) is marks
