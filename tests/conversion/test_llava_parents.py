"""A LLaVA with its connector is a parent: upcycled it computes, and writes, what LLaVA does."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from modeling_vlmoe.conversion import ProofError, UpcycleArguments, upcycle
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.upcycle import preview, write_proved
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.conversion.conftest import ALL_SPARSE
from tests.conversion.sparse_checkpoints import inputs, save_llava
from tests.models import gap

LIMIT = 1e-5
PAIRS = [("llama", "clip"), ("qwen3", "siglip"), ("phi3", "clip")]


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def upcycled(llava, out, **options):
    return upcycle(UpcycleArguments(vlm_model=str(llava), output_dir=str(out), **(ALL_SPARSE | options)))


def edit_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@torch.no_grad()
@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_an_upcycled_llava_gives_llavas_logits_and_tokens(tmp_path, text, vision):
    llava = save_llava(tmp_path / "llava", text, vision)
    out = upcycled(llava, tmp_path / "out")
    sparse, dense = load(out), load(llava)
    assert isinstance(dense, LlavaForConditionalGeneration)
    assert (sparse.config.model_type, len(sparse_blocks(sparse))) == ("vlmoe", 3 + 2 + 1)
    assert gap(sparse(**inputs()).logits, dense(**inputs()).logits) <= LIMIT
    ours, theirs = AutoProcessor.from_pretrained(out), AutoProcessor.from_pretrained(llava)
    made = {"text": "Is <image> red?", "images": torch.randint(256, (3, 20, 30), dtype=torch.uint8).numpy()}
    made = [one(**made, return_tensors="pt") for one in (ours, theirs)]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(made[0][name], made[1][name])
    generated = [
        one.generate(**batch, max_new_tokens=12, do_sample=False)
        for one, batch in zip((sparse, dense), made, strict=True)
    ]
    assert torch.equal(*generated)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, [-3, -1]], ids=str)
def test_llavas_choice_of_features_is_kept(tmp_path, strategy, layer):
    """LLaVA's "default" leaves out one token, though a SigLIP has no class token."""
    llava = save_llava(tmp_path / "llava", "llama", "siglip")
    config = LlavaConfig.from_pretrained(llava)
    config.vision_feature_layer, config.vision_feature_select_strategy = layer, strategy
    tiny.redraw(LlavaForConditionalGeneration(config)).save_pretrained(llava)
    out = upcycled(llava, tmp_path / "out")
    pixels = inputs()["pixel_values"]
    wanted, got = (torch.stack(list(load(one).model.get_image_features(pixels).pooler_output)) for one in (llava, out))
    assert got.shape[1] == tiny.NUM_PATCHES - (strategy == "default")
    assert gap(got, wanted) <= LIMIT
    assert AutoProcessor.from_pretrained(out).num_image_tokens == got.shape[1]


@torch.no_grad()
def test_an_old_sharded_tied_bf16_llava(tmp_path):
    """Before transformers 4.52 a LLaVA's LLM was a whole causal LM under `language_model.`, its ViT in a
    `vision_model.`.
    """
    llava = save_llava(tmp_path / "llava", "qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)
    edit_config(llava, tie_word_embeddings=True)
    tensors = load_file(llava / "model.safetensors")
    tensors.pop("language_model.lm_head.weight", None)
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    old = {name.replace("vision_model.vision_model.", "vision_model."): tensor for name, tensor in old.items()}
    assert any(name.startswith("language_model.model.layers.") for name in old)
    names = sorted(old)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: old[name] for name in held}, llava / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (llava / "model.safetensors.index.json").write_text(json.dumps(index))
    (llava / "model.safetensors").unlink()
    out = upcycled(llava, tmp_path / "out")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert gap(load(out)(**inputs()).logits, load(llava)(**inputs()).logits) <= LIMIT


@torch.no_grad()
def test_upcycled_and_exported_at_once_it_is_a_llava_around_a_sparse_llm(tmp_path):
    llava = save_llava(tmp_path / "llava", "qwen3")
    native = load(upcycled(llava, tmp_path / "out", format="native"))
    assert isinstance(native, LlavaForConditionalGeneration)
    assert native.config.text_config.model_type == "qwen3_moe"
    assert gap(native(**inputs()).logits, load(llava)(**inputs()).logits) <= LIMIT


def test_the_receipt_names_the_llava_and_nothing_is_drawn_but_routers(tmp_path):
    llava = save_llava(tmp_path / "llava", "llama")
    receipt = json.loads((upcycled(llava, tmp_path / "out") / "upcycle_receipt.json").read_text())
    assert receipt["parents"]["vlm"]["model_type"] == "llava"
    assert receipt["mapping"]["new"] == {"router": 6, "connector": 0}
    assert "is drawn" not in preview(UpcycleArguments(vlm_model=str(llava)))


# The proof can fail --------------------------------------------------------------------------


def dense_of(target, plan):
    return next(one.dense for one in plan.mapping.assignments if one.spec.name == target)


def other_layer(one, plan):
    return replace(one, dense=dense_of(one.spec.name.replace("layers.1", "layers.2"), plan))


MAPPING_MUTANTS = {
    "gate and up swapped": (
        "model.language_model.layers.1.mlp.experts.gate_up_proj",
        lambda one, plan: replace(one, dense=one.dense[::-1]),
        "language_model.layers.1.mlp on random input differs by",
    ),
    "another layer's MLP": (
        "model.language_model.layers.1.mlp.experts.down_proj",
        other_layer,
        "language_model.layers.1.mlp on random input differs by",
    ),
    "the connector's biases swapped": (
        "model.connector.mlp.experts.up_proj_bias",
        lambda one, plan: replace(one, dense=dense_of("model.connector.mlp.experts.down_proj_bias", plan)),
        "connector.mlp on random input differs by",
    ),
}


@pytest.mark.parametrize("name", MAPPING_MUTANTS)
def test_raises_when_the_mapping_is_wrong(tmp_path, name, leaves_nothing):
    target, change, message = MAPPING_MUTANTS[name]
    llava = save_llava(tmp_path / "llava", "llama")
    plan = plan_upcycle(UpcycleArguments(vlm_model=str(llava), **ALL_SPARSE))
    place = next(i for i, one in enumerate(plan.mapping.assignments) if one.spec.name == target)
    plan.mapping.assignments[place] = change(plan.mapping.assignments[place], plan)
    with leaves_nothing(), pytest.raises(ProofError, match=message):
        write_proved(plan, tmp_path / "out", force=False)


@pytest.mark.parametrize(
    "change",
    [
        {"connector_hidden_act": "gelu"},
        {"vision_feature_layer": -1},
        {"vision_num_prefix_tokens": 2},
        {"vision_feature_select_strategy": "full"},
    ],
    ids=str,
)
def test_raises_when_the_image_path_is_another(tmp_path, change, leaves_nothing):
    plan = plan_upcycle(UpcycleArguments(vlm_model=str(save_llava(tmp_path / "llava", "llama"))))
    for name, value in change.items():
        setattr(plan.config, name, value)
    with leaves_nothing(), pytest.raises(ProofError, match="features"):
        write_proved(plan, tmp_path / "out", force=False)


# What cannot be upcycled is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            {},
            {"vision_feature_layer": -1},
            "--vision-feature-layer is -1, but the connector of .* was trained with -2",
        ),
        ({"image_token_index": 7}, {}, "has image_token_index 7, but its processor's <image> is 295"),
        ({"model_type": "clip"}, {}, "is a clip model; expected a dense VLM that transformers registers"),
    ],
    ids=["feature layer", "image token", "no VLM"],
)
def test_raises_when_a_llava_cannot_be_upcycled(tmp_path, values, options, message, leaves_nothing):
    llava = save_llava(tmp_path / "llava", "llama")
    edit_config(llava, **values)
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        upcycled(llava, tmp_path / "out", **options)


def test_raises_when_llava_leaves_out_maths_of_the_head(tmp_path, leaves_nothing):
    llava = save_llava(tmp_path / "llava", "gemma2")
    with leaves_nothing(), pytest.raises(ValueError, match=r"names maths of the head \(final_logit_softcapping\)"):
        upcycled(llava, tmp_path / "out")


def test_raises_when_the_processor_is_no_llavas(tmp_path, leaves_nothing):
    llava = save_llava(tmp_path / "llava", "llama")
    native = AutoProcessor.from_pretrained(llava)
    (llava / "processor_config.json").unlink()
    CLIPProcessor(native.image_processor, native.tokenizer).save_pretrained(llava)
    with leaves_nothing(), pytest.raises(ValueError, match=r"is a CLIPProcessor; expected a LlavaProcessor"):
        upcycled(llava, tmp_path / "out")
