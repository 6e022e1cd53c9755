"""The acceptance: an exported model, loaded where there is no code of ours, computes what the vlmoe model does."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from modeling_vlmoe.conversion import ExportArguments, UpcycleArguments, export, upcycle
from modeling_vlmoe.conversion.export import EXPORT_RECEIPT_NAME, preview_export
from modeling_vlmoe.conversion.native_targets import DENSE_FAMILIES, PAIRS, choose_pair, declared_fields, to_native
from modeling_vlmoe.conversion.streaming import CheckpointReader
from modeling_vlmoe.conversion.upcycle import preview
from tests import tiny
from tests.conversion.sparse_checkpoints import FAMILIES, LAYERS, TARGETS, inputs, save_vlmoe
from tests.models import gap
from tests.slow import often

LIMIT = 1e-5
WITHOUT_US = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
def gap(found, wanted):
    return ((found - wanted).abs().max() / wanted.std()).item()
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    told = torch.load(folder.parent / "told.pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    processor = AutoProcessor.from_pretrained(folder)
    made = processor(text=told["text"], images=told["picture"], return_tensors="pt")
    assert all(torch.equal(made[name], told["made"][name]) for name in ("input_ids", "attention_mask", "pixel_values"))
    text = AutoModelForCausalLM.from_pretrained(folder.parent / "text", dtype=torch.float32).eval()
    with torch.no_grad():
        print(gap(model(**told["inputs"]).logits, told["logits"]), end=" ")
        print(gap(text(told["text_ids"]).logits, told["text_logits"]), end=" ")
        generated = model.generate(**made, max_new_tokens=12, do_sample=False)
        print(torch.equal(generated, told["generated"]), text.config.model_type)
"""


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def exported(checkpoint, out, **settings):
    return export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(out), **settings))


def receipt_of(folder):
    return json.loads((folder / EXPORT_RECEIPT_NAME).read_text())


@torch.no_grad()
def tell(checkpoint, file):
    """What the vlmoe model makes of a picture and text, for a process that cannot load it."""
    model, processor = load(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    picture = torch.randint(256, (3, 30, 41), dtype=torch.uint8).numpy()
    text = "What is <image> here?"
    made = processor(text=text, images=picture, return_tensors="pt")
    ids = torch.randint(6, 290, (1, 30))
    told = {"text": text, "picture": picture, "made": dict(made), "inputs": inputs(), "text_ids": ids}
    told["logits"], told["text_logits"] = model(**inputs()).logits, model(input_ids=ids).logits
    told["generated"] = model.generate(**made, max_new_tokens=12, do_sample=False)
    torch.save(told, file)


@pytest.mark.parametrize("family", often(FAMILIES, "llama", "qwen3"))
def test_exported_model_gives_the_same_logits_and_tokens_without_our_code(tmp_path, run_python, family):
    folders = []
    for vision in tiny.VISION_FAMILIES:
        for layers, chosen in LAYERS.items():
            root = tmp_path / f"{vision}-{layers}"
            checkpoint = save_vlmoe(root / "vlmoe", family, vision, chosen)
            folders.append(exported(checkpoint, root / "llava"))
            exported(checkpoint, root / "text", to="text")
            tell(checkpoint, root / "told.pt")
    code = WITHOUT_US.replace("torch.load(", "torch.load(weights_only=False, f=")
    printed = run_python(code, without_package=True, arguments=folders)
    lines = [line.split() for line in printed.splitlines() if line]
    assert len(lines) == len(folders)
    for (with_picture, text, is_same, family_written), folder in zip(lines, folders, strict=True):
        assert float(with_picture) <= LIMIT, folder
        assert float(text) <= LIMIT, folder
        assert is_same == "True", folder
        assert family_written == TARGETS[family, folder.parent.name.partition("-")[2]]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_configuration_are_those_that_transformers_writes(tmp_path, family, layers):
    out = exported(save_vlmoe(tmp_path / "vlmoe", family, layers=LAYERS[layers]), tmp_path / "llava")
    text = exported(tmp_path / "vlmoe", tmp_path / "text", to="text")
    for folder, auto in ((out, AutoModelForImageTextToText), (text, AutoModelForCausalLM)):
        model = auto.from_config(auto.from_pretrained(folder).config)
        model.save_pretrained(tmp_path / "again")
        again = load_file(tmp_path / "again" / "model.safetensors")
        found = load_file(folder / "model.safetensors")
        assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in again.items()}
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [type(model).__name__]
        assert "auto_map" not in json.dumps(config)
        assert not list(folder.glob("*.py"))


def test_generation_settings_and_template_are_kept(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe")
    for to in ("llava", "text"):
        out = exported(checkpoint, tmp_path / to, to=to)
        assert GenerationConfig.from_pretrained(out).max_new_tokens == 12
        template = (checkpoint / "chat_template.jinja").read_text()
        assert (out / "chat_template.jinja").read_text() == template


def test_the_table_knows_every_field_of_its_families():
    for pair in PAIRS:
        dense, sparse = tiny.text_config(pair.dense), AutoConfig.for_model(pair.sparse.model_type)
        known = {*declared_fields(sparse), *pair.needed, *pair.idle, "head_dim"}
        assert set(declared_fields(dense)) <= known, pair
    assert set(DENSE_FAMILIES) == set(FAMILIES)


def test_dense_layers_become_equal_experts_where_there_is_no_other_way(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", "mistral", layers=[0, 2])
    out = exported(checkpoint, tmp_path / "out")
    receipt = receipt_of(out)
    assert receipt["dense_layers_as_equal_experts"] == [1]
    assert receipt["extra_bytes"] == 4 * (3 * 3 * 32 * 48 + 4 * 32)  # three more MLPs, and a router
    tensors = load_file(out / "model.safetensors")
    name = "language_model.model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    assert all(torch.equal(tensors[name.format(0)], tensors[name.format(expert)]) for expert in range(1, 4))


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_experts_may_be_narrower_than_the_dense_mlp_was(tmp_path, family):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", family, text_moe={"moe_intermediate_size": 16})
    receipt = receipt_of(exported(checkpoint, tmp_path / "out"))
    assert receipt["text_model_type"] == "mixtral"
    assert receipt["proof"]["largest_gap"] <= LIMIT


@torch.no_grad()
def test_a_window_means_the_same(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", "mistral", text={"sliding_window": 5})
    out = exported(checkpoint, tmp_path / "out")
    model = load(out)
    assert model.config.text_config.sliding_window == 5
    assert gap(model(**inputs()).logits, load(checkpoint)(**inputs()).logits) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tied_embeddings_in_bf16_and_shards(tmp_path, monkeypatch, family):
    checkpoint = save_vlmoe(
        tmp_path / "vlmoe", family, dtype=torch.bfloat16, text={"tie_word_embeddings": True}, layers=[1]
    )
    monkeypatch.setattr("modeling_vlmoe.conversion.streaming.write_checkpoint.__defaults__", (60_000,))
    out = exported(checkpoint, tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert not any("lm_head" in name for name in CheckpointReader(out).names)
    model = load(out)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert gap(model(**inputs()).logits, load(checkpoint)(**inputs()).logits) <= LIMIT


def test_routers_keep_float32_where_the_models_dtype_would_round_them(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", dtype=torch.bfloat16)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    first = exported(checkpoint, tmp_path / "first", to="text")
    assert CheckpointReader(first).dtype(router) == torch.bfloat16  # every value fits
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.language_model.layers.0.mlp.router.weight"] = torch.randn(4, 32)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert CheckpointReader(exported(checkpoint, tmp_path / "second", to="text")).dtype(router) == torch.float32


@torch.no_grad()
def test_a_dense_model_is_exported_as_it_is(tmp_path, arguments):
    dense = upcycle(arguments(text_model=arguments().text_model, dense=True, output_dir=tmp_path / "dense"))
    out = exported(dense, tmp_path / "out")
    assert receipt_of(out)["text_model_type"] == "llama"
    assert gap(load(out)(**inputs()).logits, load(dense)(**inputs()).logits) <= LIMIT


@torch.no_grad()
def test_an_adapter_is_merged_first(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe")
    parameters = ["language_model.layers.0.mlp.experts.gate_up_proj"]
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", target_parameters=parameters)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(checkpoint), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "adapter")
    wanted = model.eval()(**inputs()).logits
    before = sorted(tmp_path.iterdir())
    out = exported(tmp_path / "adapter", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])
    assert gap(load(out)(**inputs()).logits, wanted) <= LIMIT
    assert gap(load(checkpoint)(**inputs()).logits, wanted) > 0.01


def test_a_preview_writes_nothing(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", "qwen3", layers=[0, 2])
    printed = preview_export(ExportArguments(checkpoint=str(checkpoint)))
    assert "8 x language_model.model.layers.*.mlp.experts.*.gate_proj.weight [48, 32] float32" in printed
    assert "4 x" not in preview_export(ExportArguments(checkpoint=str(checkpoint), to="text")).splitlines()[-1]


@torch.no_grad()
def test_upcycling_into_the_native_form(parents, tmp_path):
    settings = {"text_model": str(parents / "qwen3"), "vision_model": str(parents / "siglip"), "text_experts": 4}
    printed = preview(UpcycleArguments(**settings, format="native"))
    assert printed.endswith("exported from it: llava around qwen3_moe")
    out = upcycle(UpcycleArguments(**settings, format="native", output_dir=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = load(out)
    assert (model.config.model_type, model.config.text_config.model_type) == ("llava", "qwen3_moe")
    dense = AutoModelForCausalLM.from_pretrained(parents / "qwen3")
    ids = torch.randint(6, 290, (1, 20))
    assert gap(model(input_ids=ids).logits, dense(ids).logits) <= LIMIT
    assert set(receipt_of(out)["parents"]) == {"text", "vision"}


def test_raises_before_writing_when_the_native_form_is_impossible(parents, tmp_path, leaves_nothing):
    settings = {"text_model": str(parents / "phi3"), "vision_model": str(parents / "siglip"), "format": "native"}
    with leaves_nothing(), pytest.raises(ValueError, match="The LLM is a phi3 model"):
        upcycle(UpcycleArguments(**settings, output_dir=str(tmp_path / "out")))


def test_the_balance_losses_weight_is_translated(tmp_path):
    config = AutoConfig.from_pretrained(save_vlmoe(tmp_path / "vlmoe", "qwen3"))
    native = to_native(choose_pair(config), config)
    assert native.router_aux_loss_coef == config.text_moe.router_aux_loss_coef / 2  # the host's loss counts both picks
