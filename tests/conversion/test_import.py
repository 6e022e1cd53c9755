"""The acceptance: an imported model computes what its native parents compute, and is a vlmoe model like any other."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from modeling_vlmoe import VLMoEConfig
from modeling_vlmoe.conversion import ExportArguments, ImportArguments, ProofError, export, import_native, upcycle
from modeling_vlmoe.conversion.native_import import plan_import, preview_import
from modeling_vlmoe.conversion.proved_writing import write_proved
from modeling_vlmoe.towers import sparse_blocks
from tests import tiny
from tests.conversion.sparse_checkpoints import (
    EXPERTS,
    FAMILIES,
    LAYERS,
    NATIVE_FIELDS,
    inputs,
    native_text,
    save_llava,
    save_native_text,
    save_vlmoe,
)
from tests.conversion.test_parity import vision_gap
from tests.models import gap

LIMIT = 1e-5
NATIVE_FAMILIES = tuple(NATIVE_FIELDS)
# Which layers of the tiny native models are sparse, and what their LLM becomes.
BECOMES = {"mixtral": ("mistral", [0, 1, 2]), "qwen2_moe": ("qwen2", [0, 2]), "qwen3_moe": ("qwen3", [1])}


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def imported(out, **parents):
    return import_native(ImportArguments(**{k: str(v) for k, v in parents.items()}, output_dir=str(out)))


def same_weights(one, other):
    first, second = ({} for _ in range(2))
    for found, folder in ((first, one), (second, other)):
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert {name: tensor.dtype for name, tensor in first.items()} == {n: t.dtype for n, t in second.items()}


@torch.no_grad()
@pytest.mark.parametrize("vision", tiny.VISION_FAMILIES)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_imported_llava_gives_the_same_logits_and_tokens(tmp_path, family, vision):
    llava = save_llava(tmp_path / "llava", family, vision)
    out = imported(tmp_path / "out", vlm_model=llava)
    model, native = load(out), load(llava)
    dense, layers = BECOMES[family]
    assert (model.config.model_type, model.config.text_config.model_type) == ("vlmoe", dense)
    assert model.config.text_moe.layers == layers
    assert gap(model(**inputs()).logits, native(**inputs()).logits) <= LIMIT
    ours, theirs = AutoProcessor.from_pretrained(out), AutoProcessor.from_pretrained(llava)
    made = {"text": "Is <image> red?", "images": torch.zeros(3, 20, 30, dtype=torch.uint8).numpy()}
    made = [one(**made, return_tensors="pt") for one in (ours, theirs)]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(made[0][name], made[1][name])
    generated = [
        one.generate(**batch, max_new_tokens=12, do_sample=False)
        for one, batch in zip((model, native), made, strict=True)
    ]
    assert torch.equal(*generated)


@torch.no_grad()
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_imported_llm_and_vit_give_the_same_logits_and_features(tmp_path, parents, family):
    text = save_native_text(tmp_path / "text", family)
    out = imported(tmp_path / "out", text_model=text, vision_model=parents / "siglip")
    model = load(out)
    ids = torch.randint(6, 290, (2, 30))
    native = AutoModelForCausalLM.from_pretrained(text)
    assert gap(model(input_ids=ids).logits, native(ids).logits) <= LIMIT
    assert vision_gap(parents / "siglip", model) <= LIMIT
    receipt = json.loads((out / "upcycle_receipt.json").read_text())
    assert receipt["parents"]["text"]["model_type"] == family
    assert receipt["mapping"]["targets"]["stack"] == 2 * len(BECOMES[family][1])


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_both_layouts_load_and_the_fused_one_is_written(tmp_path, parents, family):
    apart = save_native_text(tmp_path / "apart", family)
    fused = save_native_text(tmp_path / "fused", family, fused=True)
    assert len(load_file(apart / "model.safetensors")) > len(load_file(fused / "model.safetensors"))
    folders = [
        imported(tmp_path / f"{one.name}-out", text_model=one, vision_model=parents / "clip") for one in (apart, fused)
    ]
    same_weights(*folders)
    names = set(load_file(folders[0] / "model.safetensors"))
    layer = BECOMES[family][1][0]
    assert f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj" in names
    assert not any(".experts.0." in name for name in names)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_gives_the_same_bits(tmp_path, family, layers):
    # A dense Mistral layer comes back as the equal experts that it was written as.
    chosen = None if family == "mistral" else LAYERS[layers]
    checkpoint = save_vlmoe(tmp_path / "vlmoe", family, "clip", chosen)
    llava = export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(tmp_path / "llava")))
    back = imported(tmp_path / "back", vlm_model=llava)
    same_weights(checkpoint, back)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, back))
    assert first["text_moe"] == second["text_moe"]
    assert (checkpoint / "chat_template.jinja").read_text() == (back / "chat_template.jinja").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_import_then_export_gives_the_same_bits(tmp_path, family, dtype):
    llava = save_llava(tmp_path / "llava", family, dtype=dtype)
    out = imported(tmp_path / "out", vlm_model=llava)
    back = export(ExportArguments(checkpoint=str(out), output_dir=str(tmp_path / "back")))
    same_weights(llava, back)
    first, second = (json.loads((folder / "config.json").read_text())["text_config"] for folder in (llava, back))
    # Which layers are sparse has two forms, defaults are written out, and the root's dtype is written in each part.
    said_otherwise = {"decoder_sparse_step", "mlp_only_layers", "head_dim", "dtype"}
    assert {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)} <= said_otherwise


def test_a_shared_expert_is_kept_and_one_of_zeros_is_not(tmp_path, parents):
    text = save_native_text(tmp_path / "text", "qwen2_moe")
    out = imported(tmp_path / "out", text_model=text, vision_model=parents / "clip")
    config = json.loads((out / "config.json").read_text())
    assert config["text_config"]["num_shared_experts"] == 1
    assert config["text_config"]["shared_expert_intermediate_size"] == 24
    tensors = load_file(text / "model.safetensors")
    for name in [name for name in tensors if "shared_expert.down_proj" in name]:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, text / "model.safetensors", metadata={"format": "pt"})
    out = imported(tmp_path / "again", text_model=text, vision_model=parents / "clip")
    assert not any("shared" in name for name in load_file(out / "model.safetensors"))
    receipt = json.loads((out / "upcycle_receipt.json").read_text())
    assert receipt["mapping"]["dropped"]["text"] == {"of a shared expert of zeros, which adds nothing": 8}


def test_an_imported_model_learns_and_comes_back(tmp_path):
    out = imported(tmp_path / "out", vlm_model=save_llava(tmp_path / "llava", "qwen2_moe"))
    model = AutoModelForImageTextToText.from_pretrained(out).train()
    batch = inputs() | {"labels": inputs()["input_ids"]}
    found = model(**batch)
    assert set(found.router_losses) == {"text"}
    found.loss.backward()
    for _, block in sparse_blocks(model):
        for name, parameter in block.named_parameters():
            assert parameter.grad.abs().max() > 0, name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        wanted = model(**inputs()).logits
        assert torch.equal(load(tmp_path / "saved")(**inputs()).logits, wanted)


@torch.no_grad()
def test_a_wholly_dense_llava_is_imported_too(tmp_path):
    llava = save_llava(tmp_path / "llava", "mixtral")
    config = LlavaConfig.from_pretrained(llava)
    config.text_config = tiny.text_config("llama")
    tiny.redraw(LlavaForConditionalGeneration(config)).save_pretrained(llava)
    model = load(imported(tmp_path / "out", vlm_model=llava))
    assert model.config.text_moe is None
    assert gap(model(**inputs()).logits, load(llava)(**inputs()).logits) <= LIMIT


# The proof can fail --------------------


def reordered(assignment):
    """Its pieces, the last expert's in the place of the first's."""
    half = len(assignment.dense) // 4
    return (*assignment.dense[-half:], *assignment.dense[half:-half], *assignment.dense[:half])


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
@pytest.mark.parametrize("inner", ["experts.down_proj", "experts.gate_up_proj"])
def test_raises_when_experts_are_swapped(tmp_path, parents, family, inner, leaves_nothing):
    text = save_native_text(tmp_path / "text", family)
    plan = plan_import(ImportArguments(text_model=str(text), vision_model=str(parents / "clip")))
    place = next(i for i, one in enumerate(plan.mapping.assignments) if one.spec.name.endswith(inner))
    one = plan.mapping.assignments[place]
    plan.mapping.assignments[place] = replace(one, dense=reordered(one))
    with leaves_nothing(), pytest.raises(ProofError, match=r"The imported model is not its parents: .*mlp .* differs"):
        write_proved(plan, tmp_path / "out", force=False)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"rms_norm_eps": 1e-2}),
    ],
    ids=str,
)
def test_raises_when_the_configuration_is_another(tmp_path, parents, family, change, leaves_nothing):
    text = save_native_text(tmp_path / "text", family)
    plan = plan_import(ImportArguments(text_model=str(text), vision_model=str(parents / "clip")))
    for name, value in change.items():
        setattr(plan.config.text_config, name, value)
    with leaves_nothing(), pytest.raises(ProofError, match=r"The imported model is not its parents: .* differs"):
        write_proved(plan, tmp_path / "out", force=False)


def test_raises_when_the_projector_is_another(tmp_path, leaves_nothing):
    plan = plan_import(ImportArguments(vlm_model=str(save_llava(tmp_path / "llava", "mixtral"))))
    plan.config.connector_hidden_act = "gelu"
    with leaves_nothing(), pytest.raises(ProofError, match=r"image features.* differs by"):
        write_proved(plan, tmp_path / "out", force=False)


# What cannot be imported is refused ----------------------------------------------------------


def test_upcycle_refuses_a_sparse_llm_and_names_the_command(tmp_path, arguments, leaves_nothing):
    text = save_native_text(tmp_path / "text", "qwen3_moe")
    with leaves_nothing(), pytest.raises(ValueError, match=r"is already sparse.*`vlmoe import --text-model"):
        upcycle(arguments(text_model=text))
    llava = save_llava(tmp_path / "llava", "mixtral")
    with (
        leaves_nothing(),
        pytest.raises(ValueError, match=r"is a LLaVA whose LLM is already sparse: its mixtral.*`vlmoe import --vlm"),
    ):
        upcycle(arguments(text_model=None, vision_model=None, vlm_model=llava))


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise is 0.1 \(expected 0.0\)"),
        ("qwen2_moe", {"use_sliding_window": True}, r"use_sliding_window is True \(expected False\)"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer is sparse"),
    ],
    ids=str,
)
def test_raises_when_the_llm_has_what_ours_has_not(tmp_path, parents, family, fields, message, leaves_nothing):
    text = save_native_text(tmp_path / "text", family, **fields)
    with leaves_nothing(), pytest.raises(ValueError, match=f"cannot be imported without loss: .*{message}"):
        imported(tmp_path / "out", text_model=text, vision_model=parents / "clip")


def test_raises_when_the_parents_are_of_another_kind(tmp_path, parents, upcycled, leaves_nothing):
    for given, message in (
        (
            {"text_model": parents / "llama", "vision_model": parents / "clip"},
            "A dense LLM is made sparse by `vlmoe up",
        ),
        ({"vlm_model": upcycled}, "is a vlmoe model; expected a llava one"),
        ({"text_model": parents / "llama"}, "Give --text-model and --vision-model, or --vlm-model alone"),
        ({"vlm_model": "/no/such"}, "--vlm-model /no/such: there is no such folder"),
    ):
        with leaves_nothing(), pytest.raises(ValueError, match=message):
            imported(tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.0.mlp.experts.2.up_proj.weight", "lacks 1 of the 2 tensors of expert 2"),
        ("model.layers.2.mlp.gate.weight", "lacks tensors of Qwen2MoeForCausalLM: model.layers.2.mlp.gate.weight"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", r"has the shape \(3, 32, 16\), but config.json makes it"),
    ],
)
def test_raises_when_a_tensor_is_missing(tmp_path, parents, key, message, leaves_nothing):
    text = save_native_text(tmp_path / "text", "qwen2_moe")
    tensors = load_file(text / "model.safetensors")
    del tensors[key]
    save_file(tensors, text / "model.safetensors", metadata={"format": "pt"})
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        imported(tmp_path / "out", text_model=text, vision_model=parents / "clip")


def test_raises_when_an_option_contradicts_the_llava(tmp_path, leaves_nothing):
    llava = save_llava(tmp_path / "llava", "mixtral")
    with leaves_nothing(), pytest.raises(ValueError, match=r"--vision-feature-layer is given, but .*; leave it out"):
        import_native(ImportArguments(vlm_model=str(llava), vision_feature_layer=-1, output_dir=str(tmp_path / "out")))


def test_raises_when_the_strategy_is_unknown():
    with pytest.raises(ValueError, match="--vision-feature-select-strategy is some; expected default or full"):
        ImportArguments(vision_feature_select_strategy="some")


def test_raises_when_the_processor_is_another_models(tmp_path, leaves_nothing):
    llava = save_llava(tmp_path / "llava", "mixtral")
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(config | {"image_token_index": 7}))
    with (
        leaves_nothing(),
        pytest.raises(ValueError, match="has image_token_index 7, but its processor's <image> is 295"),
    ):
        imported(tmp_path / "out", vlm_model=llava)


def test_a_preview_writes_nothing(tmp_path, parents):
    text = save_native_text(tmp_path / "text", "mixtral")
    before = sorted(tmp_path.rglob("*"))
    printed = preview_import(ImportArguments(text_model=str(text), vision_model=str(parents / "clip")))
    assert "stack   3 x model.language_model.layers.*.mlp.experts.gate_up_proj [4, 96, 32] float32" in printed
    assert "the dense connector that these are made of is drawn" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_text_moe_of_a_sparse_configuration_names_the_command():
    with pytest.raises(ValueError, match="`vlmoe import` makes a vlmoe model of a sparse LLM"):
        VLMoEConfig(text_config=native_text("mixtral"), vision_config=tiny.vision_config("clip"), text_moe=EXPERTS)


def test_a_sharded_parent(tmp_path, parents):
    text = save_native_text(tmp_path / "text", "qwen3_moe")
    whole = imported(tmp_path / "whole", text_model=text, vision_model=parents / "clip")
    shutil.rmtree(text)
    model = tiny.redraw(AutoModelForCausalLM.from_config(native_text("qwen3_moe")))
    model.save_pretrained(text, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(text)
    assert len(list(text.glob("model-*"))) > 2
    same_weights(whole, imported(tmp_path / "again", text_model=text, vision_model=parents / "clip"))
