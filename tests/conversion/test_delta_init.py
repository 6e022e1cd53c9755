"""`--expert-init delta`: exact at start, of about the dense model's size, and it survives whatever is done to it."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.conversion import ProofError, UpcycleArguments, upcycle
from modeling_vlmoe.conversion.upcycle import preview
from modeling_vlmoe.delta_experts import delta_experts
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.models import batch, gap

PARTS = {"text_experts": 4, "vision_experts": 3, "connector_experts": 3}


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    tiny.save_text_parent(folder / "text", "llama")
    tiny.save_vision_parent(folder / "vision", "siglip")
    return {"text_model": str(folder / "text"), "vision_model": str(folder / "vision")}


def arguments(parents, **given):
    return UpcycleArguments(**(parents | {"expert_init": "delta", "expert_rank": 2} | given))


@pytest.fixture(scope="module")
def folder(parents, tmp_path_factory):
    return upcycle(arguments(parents, output_dir=tmp_path_factory.mktemp("delta") / "out", **PARTS))


def size(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_every_part_has_delta_experts_that_are_the_dense_mlp(folder, parents, tmp_path):
    model = VLMoEForConditionalGeneration.from_pretrained(folder)
    assert len(delta_experts(model)) == len(sparse_blocks(model)) == 3 + 2 + 1
    copies = upcycle(arguments(parents, output_dir=tmp_path / "full", expert_init="copy", expert_rank=None, **PARTS))
    full = VLMoEForConditionalGeneration.from_pretrained(copies)
    inputs = batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == 300, model.config.image_token_id)
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        assert gap(model(**inputs).logits[real], full(**inputs).logits[real]) <= 1e-5


def test_the_checkpoint_has_about_the_dense_models_size(folder, parents, tmp_path):
    dense = upcycle(UpcycleArguments(**parents, dense=True, output_dir=tmp_path / "dense"))
    full = upcycle(arguments(parents, output_dir=tmp_path / "full", expert_init="copy", expert_rank=None, **PARTS))
    names = set(AutoModelForImageTextToText.from_pretrained(folder).state_dict())
    assert {name.rpartition(".")[2] for name in names if ".deltas." in name} == {
        *(f"{stack}_{pair}" for stack in ("gate_up_proj", "up_proj", "down_proj") for pair in "ab"),
        "up_proj_bias",
        "down_proj_bias",
    }
    assert size(folder) < 1.6 * size(dense) < size(full)


def test_the_receipt_says_what_was_made(folder):
    receipt = json.loads((folder / "upcycle_receipt.json").read_text())
    assert receipt["settings"]["expert_init"] == "delta"
    assert receipt["settings"]["text_moe"]["expert_type"] == "delta"
    assert receipt["settings"]["vision_moe"]["expert_rank"] == 2
    assert receipt["proof"]["largest_gap"] <= receipt["proof"]["largest_gap_limit"]
    assert {"base", "pair a", "pair b"} <= set(receipt["mapping"]["targets"])


def test_the_same_seed_draws_the_same_pairs(folder, parents, tmp_path):
    again = upcycle(arguments(parents, output_dir=tmp_path / "again", **PARTS))
    other = upcycle(arguments(parents, output_dir=tmp_path / "other", seed=1, **PARTS))
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (folder / weights).read_bytes()
    assert (other / weights).read_bytes() != (folder / weights).read_bytes()


def test_bf16_parents_stay_exact(tmp_path):
    tiny.save_text_parent(tmp_path / "text", "qwen3", dtype=torch.bfloat16)
    tiny.save_vision_parent(tmp_path / "vision", "clip", dtype=torch.bfloat16)
    given = {"text_model": str(tmp_path / "text"), "vision_model": str(tmp_path / "vision")}
    made = upcycle(arguments(given, output_dir=tmp_path / "out", **PARTS))
    model = AutoModelForImageTextToText.from_pretrained(made)
    assert {value.dtype for name, value in model.named_parameters() if ".experts." in name} == {torch.bfloat16}


def test_saving_and_loading_give_the_same_bits(folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    tiny.redraw(model).save_pretrained(tmp_path / "again")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.config.text_moe.to_dict() == model.config.text_moe.to_dict()


REMOTE = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({folder!r}, trust_remote_code=True)
print(type(model).__module__.split(".")[0], model.model.language_model.layers[0].mlp.experts.rank)
with torch.no_grad():
    print(model(input_ids=torch.arange(6, 12)[None]).logits.abs().sum().item() > 0)
"""


def test_it_loads_without_the_package(folder, run_without_package):
    assert run_without_package(REMOTE.format(folder=str(folder))).split() == ["transformers_modules", "2", "True"]


def test_a_frozen_base_stays_frozen_when_loaded(folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder, text_moe={"train_expert_base": False})
    model.save_pretrained(tmp_path / "frozen")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "frozen")
    frozen = {name for name, value in loaded.named_parameters() if not value.requires_grad}
    layers = [f"model.language_model.layers.{index}.mlp.experts" for index in range(3)]
    assert frozen == {f"{layer}.{name}" for layer in layers for name in ("gate_up_proj", "down_proj")}


def test_the_preview_counts_the_pairs(parents):
    text = preview(arguments(parents, text_experts=4))
    assert "base    3 x model.language_model.layers.*.mlp.experts.down_proj [32, 48]" in text
    assert "pair b  3 x model.language_model.layers.*.mlp.experts.deltas.gate_up_proj_b [4, 96, 2]" in text


def test_in_memory_too(parents):
    model = VLMoEForConditionalGeneration.from_vision_text_pretrained(
        parents["vision_model"],
        parents["text_model"],
        text_moe={"num_experts": 4, "expert_type": "delta", "expert_rank": 2},
        image_token_id=300,
    )
    dense = tiny.text_model("llama")
    ids = torch.arange(6, 16)[None]
    with torch.no_grad():
        assert gap(model(input_ids=ids).logits, dense(input_ids=ids).logits) <= 1e-5
    assert all(one.deltas.down_proj_a.abs().max() > 0 for _, one in delta_experts(model))


def test_a_wrong_base_is_no_checkpoint(parents, tmp_path, monkeypatch):

    from modeling_vlmoe.conversion import operations

    right = operations.OPERATIONS["base"]

    def wrong(assignment, drawing):
        for block in right(assignment, drawing):
            yield block.flip(0)

    monkeypatch.setitem(operations.OPERATIONS, "base", wrong)
    with pytest.raises(ProofError, match=r"layers.0.mlp on"):
        upcycle(arguments(parents, output_dir=tmp_path / "out", text_experts=4))
    assert not (tmp_path / "out").exists()


def test_raises_when_a_rank_is_given_to_copies(parents):
    with pytest.raises(ValueError, match="--expert-rank 2 is given, but experts of --expert-init copy have no rank"):
        preview(arguments(parents, expert_init="copy"))


def test_raises_when_native_classes_are_to_hold_them(parents, tmp_path):
    with pytest.raises(ValueError, match=r"--format native needs experts with weights of their own.*vlmoe densify"):
        upcycle(arguments(parents, format="native", output_dir=tmp_path / "out"))
