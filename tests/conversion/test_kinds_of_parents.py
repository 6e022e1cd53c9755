"""Dense LLMs of every kind that users have, and ViTs with and without tokens before their patches: each is upcycled
unchanged, and the proof sees when what makes it its kind is gone.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe.conversion import ExportArguments, ProofError, UpcycleArguments, export, upcycle
from modeling_vlmoe.conversion.backbones.tiny_parents import build_parent, save_parent, save_partner
from modeling_vlmoe.conversion.parents import check_text
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.upcycle import write_proved
from modeling_vlmoe.text_head import head_maths
from tests import tiny
from tests.conversion.conftest import ALL_SPARSE
from tests.conversion.test_parity import text_gap
from tests.models import gap

LIMIT = 1e-5
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NO_ROPE_SCALING = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# The kind, its family and fields, and the change of the written configuration that the proof has to see.
KINDS = {
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}, {"hidden_act": "gelu"}),
    "biased attention": ("qwen2", {}, {"rms_norm_eps": 1e-2}),
    "one key-value head": ("llama", {"num_key_value_heads": 1}, {"rms_norm_eps": 1e-2}),
    "sliding window": ("mistral", {"sliding_window": 4}, {"sliding_window": None}),
    "hybrid attention": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4, "tie_word_embeddings": True},
        {"layer_types": ["full_attention"] * 4},
    ),
    "linear attention": (
        "qwen3_5_text",
        LINEAR | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        {"rms_norm_eps": 1e-2},
    ),
    "rope: llama3": ("llama", {"rope_parameters": LLAMA3}, {"rope_parameters": NO_ROPE_SCALING}),
    "rope: yarn": ("qwen3", {"rope_parameters": YARN, "head_dim": 8}, {"rope_parameters": NO_ROPE_SCALING}),
}


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_an_llm_of_this_kind_gives_dense_logits(tmp_path, arguments, kind):
    family, fields, _ = KINDS[kind]
    text = tiny.save_text_parent(tmp_path / "text", family, **fields)
    assert text_gap(text, load(upcycle(arguments(text_model=text)))) <= LIMIT


@pytest.mark.parametrize("kind", KINDS)
def test_raises_when_what_makes_the_kind_is_gone(tmp_path, arguments, kind, leaves_nothing):
    family, fields, change = KINDS[kind]
    text = tiny.save_text_parent(tmp_path / "text", family, **fields)
    plan = plan_upcycle(arguments(text_model=text))
    for name, value in change.items():
        setattr(plan.config.text_config, name, value)
    with leaves_nothing(), pytest.raises(ProofError, match=r"(text logits|layers\.\d+\.mlp on).* differs by"):
        write_proved(plan, tmp_path / "out", force=False)


@torch.no_grad()
def test_a_sharded_tied_bf16_hybrid_generates_what_it_did(tmp_path, arguments):
    family, fields, _ = KINDS["hybrid attention"]
    text = tiny.save_text_parent(tmp_path / "text", family, torch.bfloat16, "20KB", **fields)
    sparse = load(upcycle(arguments(text_model=text)))
    dense = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    ids = torch.randint(6, 290, (1, 12))
    made = [model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0) for model in (dense, sparse)]
    assert torch.equal(*made)


# ViTs: tokens before the patches -------------------------------------------------------------

VITS = {
    "class token": ("clip_vision_model", {}, 1),
    "class token and registers": ("dinov2_with_registers", {"num_register_tokens": 3}, 4),
    "rotary, with registers": ("dinov3_vit", {"num_register_tokens": 2, "use_gated_mlp": True}, 3),
    "class and distillation token": ("deit", {}, 2),
    "pooling head": ("siglip_vision_model", {}, 0),
    "none of them": ("ijepa", {}, 0),
}


def save_vit(folder, kind):
    family, fields, _ = VITS[kind]
    given = {
        name: value for name, value in tiny.VISION_FIELDS.items() if "dinov2" not in family or "inter" not in name
    }
    model = tiny.redraw(AutoModel.from_config(AutoConfig.for_model(family, **(given | fields)))).eval()
    model.save_pretrained(folder)
    tiny.image_processor("siglip").save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("strategy", [None, "full"])
@pytest.mark.parametrize("kind", VITS)
def test_only_patches_become_image_tokens(tmp_path, arguments, kind, strategy):
    vision = save_vit(tmp_path / "vision", kind)
    out = upcycle(arguments(vision_model=vision, vision_feature_select_strategy=strategy, vision_experts=2))
    sparse, processor = load(out), AutoProcessor.from_pretrained(out)
    num_prefix = VITS[kind][2]
    assert sparse.config.vision_feature_select_strategy == (strategy or ("default" if num_prefix else "full"))
    assert processor.num_image_tokens == tiny.NUM_PATCHES + (num_prefix if strategy == "full" else 0)
    pictures = [Image.new("RGB", (30, 20)), Image.new("RGB", (8, 50), "red")]
    inputs = processor(text="<image>a<image>", images=pictures, return_tensors="pt")
    features = sparse.get_image_features(inputs["pixel_values"]).pooler_output
    assert [len(one) for one in features] == [processor.num_image_tokens] * 2
    dense = AutoModel.from_pretrained(vision).eval()
    wanted = dense(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    got = sparse.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    assert gap(got, wanted) <= LIMIT
    if strategy is None:  # the patches are the last of what the ViT gives
        read = sparse.model.connector(wanted[:, -tiny.NUM_PATCHES :])[0]
        assert gap(torch.stack(list(features)), read) <= 1e-4
    sparse(**inputs)


def test_old_names_of_a_vit_are_renamed(tmp_path, arguments):
    """DINOv3's layers were `layer.`; the host writes them so, and reads them as `model.layer.`."""
    vision = save_vit(tmp_path / "vision", "rotary, with registers")
    assert any(name.startswith("layer.0.") for name in load_file(vision / "model.safetensors"))
    upcycle(arguments(vision_model=vision, **ALL_SPARSE))


def test_export_refuses_registers_that_llava_would_keep(tmp_path, arguments, leaves_nothing):
    vision = save_vit(tmp_path / "vision", "class token and registers")
    out = upcycle(arguments(vision_model=vision, output_dir=tmp_path / "model"))
    with leaves_nothing(), pytest.raises(ValueError, match=r"leaves out 4 tokens .* LLaVA's \"default\" leaves out 1"):
        export(ExportArguments(checkpoint=str(out), output_dir=str(tmp_path / "out")))
    export(ExportArguments(checkpoint=str(out), output_dir=str(tmp_path / "text"), to="text"))


def test_raises_when_registers_are_read_as_patches(tmp_path, arguments):
    plan = plan_upcycle(arguments(vision_model=save_vit(tmp_path / "vision", "class token and registers")))
    plan.config.vision_num_prefix_tokens = 1
    with pytest.raises(ProofError, match="features"):
        write_proved(plan, tmp_path / "out", force=False)


def test_a_json_of_the_config_keeps_its_choice(tmp_path, arguments):
    out = upcycle(arguments(vision_model=save_vit(tmp_path / "vision", "class token and registers")))
    written = json.loads((out / "config.json").read_text())
    assert (written["vision_num_prefix_tokens"], written["vision_feature_select_strategy"]) == (4, "default")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "the logits of a token depend on later ones"),
        ("trocr", {}, "which transformers registers with a head only"),
        ("gemma3n_text", {}, "text_config.hidden_size_per_layer_input is 8"),
        ("mamba", {}, "No layer has one: leave this part dense"),
    ],
)
def test_an_llm_that_cannot_be_is_refused_by_what_it_is(tmp_path, family, fields, message):
    text = save_parent(build_parent(family, "text", **fields), "text", tmp_path / "text")
    vision = save_partner("text", tmp_path / "vision")
    settings = UpcycleArguments(text_model=str(text), vision_model=str(vision), output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        upcycle(settings)
    assert not (tmp_path / "out").exists()


def test_a_decoder_with_an_encoder_is_refused():
    with pytest.raises(ValueError, match=r"a bart model, a decoder with an encoder \(is_encoder_decoder\)"):
        check_text("it", AutoConfig.for_model("bart"))


def test_a_scale_of_one_is_no_maths_of_the_head():
    config = AutoConfig.for_model("granite", logits_scaling=1.0)
    assert not head_maths(config)
    config.logits_scaling = 2.0
    assert list(head_maths(config)) == ["logits_scaling"]
