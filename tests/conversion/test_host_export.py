"""The acceptance: a host's VLM, sparse in place, exported and loaded where there is no code of ours, computes what it
did.
"""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from modeling_vlmoe.conversion import (
    ExportArguments,
    ImportArguments,
    UpcycleArguments,
    export,
    import_native,
    upcycle,
)
from modeling_vlmoe.conversion.export import EXPORT_RECEIPT_NAME, preview_export
from modeling_vlmoe.conversion.host_processors import load_processor, processor_files
from modeling_vlmoe.conversion.host_targets import SIBLINGS
from modeling_vlmoe.conversion.streaming import CheckpointReader
from modeling_vlmoe.finetune import lora_config
from tests import hosts
from tests.conversion.sparse_checkpoints import LAYERS, save_hosted
from tests.models import gap

LIMIT = 1e-5
# Each family, which of its layers are sparse, and what its LLM is written as.
WRITTEN = {
    ("qwen3_vl", "all"): "qwen3_vl_moe_text",
    ("qwen3_vl", "alternate"): "qwen3_vl_moe_text",
    ("qwen3_5", "all"): "qwen3_5_moe_text",
    ("qwen3_5", "alternate"): "qwen3_5_moe_text",
    ("llava_next", "all"): "mixtral",
    ("llava_next", "alternate"): "mixtral",
    ("llava_onevision", "alternate"): "qwen2_moe",
    ("internvl", "all"): "qwen2_moe",
    ("mistral3", "all"): "mixtral",
    ("smolvlm", "all"): "mixtral",
    ("idefics3", "alternate"): "qwen2_moe",
}
WITHOUT_US = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
def gap(found, wanted):
    return ((found - wanted).abs().max() / wanted.std()).item()
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    told = torch.load(folder.parent / "told.pt", weights_only=False)
    auto = AutoModelForImageTextToText if "made" in told else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        print(model.config.get_text_config().model_type, gap(model(told["ids"]).logits, told["text_logits"]), end=" ")
        if "made" in told:
            print(gap(model(**told["made"]).logits, told["logits"]), end=" ")
            generated = model.generate(**told["made"], max_new_tokens=12, do_sample=False)
            print(torch.equal(generated, told["generated"]), end="")
    print()
"""


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def exported(checkpoint, out, **settings):
    return export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(out), **settings))


def receipt_of(folder):
    return json.loads((folder / EXPORT_RECEIPT_NAME).read_text())


@torch.no_grad()
def tell(checkpoint, family, file, with_pictures=True):
    """What the sparse VLM makes of two pictures and text, and of text, for a process that cannot load it."""
    model, ids = load(checkpoint), torch.randint(6, 280, (1, 30))
    told = {"ids": ids, "text_logits": model(input_ids=ids).logits}
    if with_pictures:
        told["made"] = made = hosts.inputs(load_processor(checkpoint, "it", family)[0], family, (2,))
        told["logits"] = model(**made).logits
        told["generated"] = model.generate(**made, max_new_tokens=12, do_sample=False)
    torch.save(told, file)


def test_an_exported_host_gives_the_same_logits_and_tokens_without_our_code(tmp_path, run_python):
    folders = []
    for family, layers in WRITTEN:
        root = tmp_path / f"{family}-{layers}"
        checkpoint = save_hosted(root / "sparse", family, LAYERS[layers])
        folders.append(exported(checkpoint, root / "native"))
        tell(checkpoint, family, root / "told.pt")
    printed = run_python(WITHOUT_US, without_package=True, arguments=folders)
    lines = [line.split() for line in printed.splitlines() if line]
    for (text_type, of_text, of_pictures, is_same), folder, family in zip(lines, folders, WRITTEN, strict=True):
        assert text_type == WRITTEN[family]
        assert float(of_text) <= LIMIT, folder
        assert float(of_pictures) <= LIMIT, folder
        assert is_same == "True", folder
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == SIBLINGS.get(family[0], family[0])


def test_the_lm_alone_gives_the_same_logits_without_our_code(tmp_path, run_python):
    folders = []
    for family in ("qwen3_5", "llava_next", "llava_onevision", "smolvlm"):
        checkpoint = save_hosted(tmp_path / family / "sparse", family)
        folders.append(exported(checkpoint, tmp_path / family / "text", to="text"))
        tell(checkpoint, family, tmp_path / family / "told.pt", with_pictures=False)
        assert not any("visual" in name or "vision" in name for name in CheckpointReader(folders[-1]).names)
    printed = run_python(WITHOUT_US, without_package=True, arguments=folders)
    assert [line.split()[0] for line in printed.splitlines()] == [
        "qwen3_5_moe_text",
        "mixtral",
        "qwen2_moe",
        "mixtral",
    ]
    assert all(float(line.split()[1]) <= LIMIT for line in printed.splitlines())


def test_qwen3_vl_moe_holds_its_experts_transposed(tmp_path):
    checkpoint = save_hosted(tmp_path / "sparse", "qwen3_vl")
    out = exported(checkpoint, tmp_path / "out")
    ours, theirs = CheckpointReader(checkpoint), CheckpointReader(out)
    for name in ("gate_up_proj", "down_proj"):
        stack = f"model.language_model.layers.1.mlp.experts.{name}"
        assert torch.equal(theirs.tensor(stack), ours.tensor(stack).mT)


@pytest.mark.parametrize(("family", "layers"), WRITTEN)
def test_names_and_configuration_are_those_that_transformers_writes(tmp_path, family, layers):
    checkpoint = save_hosted(tmp_path / "sparse", family, LAYERS[layers])
    out = exported(checkpoint, tmp_path / "out")
    model = AutoModelForImageTextToText.from_config(AutoModelForImageTextToText.from_pretrained(out).config)
    model.save_pretrained(tmp_path / "again")
    again, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", out))
    assert {name: one.numel() for name, one in found.items()} == {name: one.numel() for name, one in again.items()}
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert not {"auto_map", "body_model_type", "text_moe", "vision_moe", "connector_moe"} & set(config)
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_processor_and_generation_settings_are_copied(tmp_path, family):
    checkpoint = save_hosted(tmp_path / "sparse", family)
    out = exported(checkpoint, tmp_path / "out")
    names = [file.relative_to(checkpoint) for file in processor_files(checkpoint)]
    assert names
    assert all((out / name).read_bytes() == (checkpoint / name).read_bytes() for name in names)
    settings = [json.loads((folder / "generation_config.json").read_text()) for folder in (checkpoint, out)]
    assert settings[0] == settings[1]
    assert settings[1]["max_new_tokens"] == 12


@torch.no_grad()
def test_a_tied_model_in_bfloat16_and_shards(tmp_path, monkeypatch):
    tied = {"tie_word_embeddings": True}
    checkpoint = save_hosted(tmp_path / "sparse", "qwen3_vl", [1], torch.bfloat16, root=tied, shard_size="80KB")
    monkeypatch.setattr("modeling_vlmoe.conversion.streaming.write_checkpoint.__defaults__", (60_000,))
    out = exported(checkpoint, tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert not any("lm_head" in name for name in CheckpointReader(out).names)
    model = load(out)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    given = hosts.inputs(load_processor(out, "it", "qwen3_vl")[0], "qwen3_vl")
    assert gap(model(**given).logits, load(checkpoint)(**given).logits) <= LIMIT
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16


def test_auto_processor_reads_what_was_copied(tmp_path, run_python):
    """The other hosts' needs torchvision, dense or sparse."""
    checkpoint = save_hosted(tmp_path / "sparse", "llava_next")
    out = exported(checkpoint, tmp_path / "out")
    code = """
import sys
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
print(type(processor).__name__, processor(text="what?", return_tensors="pt")["input_ids"].tolist())
"""
    ids = load_processor(checkpoint, "it", "llava_next")[0](text="what?", return_tensors="pt")["input_ids"].tolist()
    assert run_python(code, without_package=True, arguments=[out]).strip() == f"LlavaNextProcessor {ids}"


def test_the_receipt_says_what_was_proved(tmp_path):
    receipt = receipt_of(exported(save_hosted(tmp_path / "sparse", "qwen3_vl", [0, 2]), tmp_path / "out"))
    assert (receipt["model_type"], receipt["text_model_type"]) == ("qwen3_vl_moe", "qwen3_vl_moe_text")
    assert receipt["dense_layers_as_equal_experts"] == []
    assert {"logits of a picture and text", "logits of text"} <= set(receipt["proof"]["gaps"])
    assert "model.language_model.layers.2.mlp by every expert" in receipt["proof"]["gaps"]
    assert any("bfloat16, exported" in what for what in receipt["proof"]["informative"])
    assert str(tmp_path) not in json.dumps(receipt)
    assert "lm_head" not in receipt["mapping"]["dropped"]["vlmoe"]


def test_dense_layers_become_equal_experts_where_there_is_no_other_way(tmp_path):
    out = exported(save_hosted(tmp_path / "sparse", "qwen3_5", [0, 2]), tmp_path / "out")
    assert receipt_of(out)["dense_layers_as_equal_experts"] == [1]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_experts_of_image_parts_that_are_still_copies_become_dense_exactly(tmp_path, family):
    dense = hosts.save(tmp_path / "dense", family)
    asked = {"text_experts": 4, "vision_experts": 3, "connector_experts": 2}
    sparse = upcycle(UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "sparse"), **asked))
    out = exported(sparse, tmp_path / "out")
    model = load(out)
    given = hosts.inputs(load_processor(out, "it", family)[0], family)
    assert gap(model(**given).logits, load(dense)(**given).logits) <= LIMIT
    with_experts = {name.rpartition(".experts.")[0] for name in model.state_dict() if ".experts." in name}
    assert len(with_experts) == model.config.get_text_config().num_hidden_layers
    num_routers = hosts.HOSTS[family].layers - max(1, hosts.HOSTS[family].layers // 2) + 1
    said = "of experts that are written as one dense MLP (equal copies)"
    assert receipt_of(out)["mapping"]["dropped"]["vlmoe"] == {said: num_routers}


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_an_adapter_on_a_host_is_merged_first(tmp_path, family):
    """LoRA on attention and experts of the LLM with the routers whole: natively it computes what it did with PEFT."""
    checkpoint = save_hosted(tmp_path / "sparse", family)
    adapted = load(checkpoint)
    adapted = get_peft_model(adapted, lora_config(adapted, lora_r=2))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    hosts.processor(family).save_pretrained(tmp_path / "adapter")
    native = load(exported(tmp_path / "adapter", tmp_path / "native"))
    assert type(native).__module__.startswith("transformers.")
    made = hosts.inputs(hosts.processor(family), family, (2,))
    wanted = adapted.eval()(**made).logits
    assert gap(native(**made).logits, wanted) <= LIMIT
    assert gap(load(checkpoint)(**made).logits, wanted) > 1e-2


def test_raises_when_an_exported_host_is_imported(tmp_path):
    native = exported(save_hosted(tmp_path / "sparse", "qwen3_vl"), tmp_path / "native")
    for role, message in (
        ("vlm", r"is a qwen3_vl_moe model; expected a llava one\. .* made sparse in place, from its dense checkpoint"),
        ("text", "is a qwen3_vl_moe model; expected one of "),
    ):
        given = {f"{role}_model": str(native)} | ({"vision_model": str(native)} if role == "text" else {})
        with pytest.raises(ValueError, match=f"--{role}-model .*{message}"):
            import_native(ImportArguments(**given, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_preview_says_what_becomes_of_what(tmp_path):
    checkpoint = save_hosted(tmp_path / "sparse", "qwen3_vl")
    before = sorted(tmp_path.iterdir())
    printed = preview_export(ExportArguments(checkpoint=str(checkpoint)))
    assert "qwen3_vl, sparse in place, becomes qwen3_vl_moe around qwen3_vl_moe_text" in printed
    assert "gate_up_proj [4, 32, 96] float32 of gate_up_proj, each expert transposed" in printed
    assert sorted(tmp_path.iterdir()) == before


def test_the_tokenizer_of_an_lm_alone_is_the_processors(tmp_path):
    checkpoint = save_hosted(tmp_path / "sparse", "llava_onevision")
    out = exported(checkpoint, tmp_path / "out", to="text")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert (out / "tokenizer.json").is_file()
    assert not (out / "processor_config.json").exists()
