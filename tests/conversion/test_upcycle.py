"""The folder that is written, what it says of itself, and what happens when writing fails."""

import errno
import hashlib
import json
import os

import pytest
import torch
from transformers import AutoProcessor

from modeling_vlmoe.conversion import upcycle
from modeling_vlmoe.conversion.assignments import DenseTensor
from modeling_vlmoe.conversion.mapping import map_tensors
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.summaries import format_bytes
from modeling_vlmoe.conversion.upcycle import preview
from modeling_vlmoe.conversion.written_file import WrittenFile
from tests.conversion.conftest import ALL_SPARSE


def test_the_folder_loads_where_the_package_is_not_installed(upcycled, run_without_package):
    said = run_without_package(
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(upcycled)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(upcycled)!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, type(processor).__name__, processor.num_image_tokens)"
    )
    assert said.split()[-3:] == ["VLMoEForConditionalGeneration", "VLMoEProcessor", "9"]


@pytest.fixture
def receipt(upcycled):
    return json.loads((upcycled / "upcycle_receipt.json").read_text())


def test_the_folder_holds_a_whole_checkpoint(upcycled):
    names = {file.name for file in upcycled.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "upcycle_receipt.json",
        "configuration_vlmoe.py",
        "modeling_vlmoe.py",
        "processing_vlmoe.py",
    }
    config = json.loads((upcycled / "config.json").read_text())
    assert config["architectures"] == ["VLMoEForConditionalGeneration"]
    assert config["auto_map"]["AutoConfig"] == "configuration_vlmoe.VLMoEConfig"
    assert config["dtype"] == config["text_config"]["dtype"] == "float32"
    assert AutoProcessor.from_pretrained(upcycled).image_token_id == config["image_token_id"]


def test_nothing_in_the_folder_names_a_path_of_the_machine(upcycled, parents):
    for file in upcycled.iterdir():
        assert str(parents).encode() not in file.read_bytes(), file.name


def test_the_receipt_says_of_what_and_how(receipt, parents):
    assert receipt["parents"]["text"]["name"] == "llama"
    assert (
        receipt["parents"]["text"]["config_sha256"]
        == hashlib.sha256((parents / "llama/config.json").read_bytes()).hexdigest()
    )
    assert receipt["seed"] == 0
    settings = receipt["settings"]
    assert settings["text_moe"]["layers"] == [0, 1, 2]
    assert (settings["vision_moe"]["layers"], settings["vision_moe"]["num_experts_per_tok"]) == ([1, 2], 2)
    assert (settings["expert_init"], settings["router_init"]) == ("copy", "uniform")
    assert (settings["dtype"], settings["casts"], settings["num_image_tokens"]) == ("float32", [], 9)
    assert set(receipt["versions"]) == {"vlmoe", "torch", "transformers", "safetensors"}


def test_the_receipt_holds_every_gap(receipt):
    proof = receipt["proof"]
    assert 0 < proof["largest_gap"] == max(one["gap"] for one in proof["gaps"].values()) <= proof["limit"] == 1e-5
    assert len(proof["gaps"]) == 2 * (3 + 2 + 1) + 5


def test_the_receipt_counts_parameters_and_tensors(receipt, upcycled):
    from safetensors.torch import load_file

    written = load_file(upcycled / "model.safetensors")
    total = sum(tensor.numel() for tensor in written.values())
    idle = sum(t.numel() * (len(t) - 2) // len(t) for name, t in written.items() if ".experts." in name)
    assert receipt["parameters"] == {"total": total, "active": total - idle}
    mapping = receipt["mapping"]
    assert sum(mapping["targets"].values()) == len(written)
    assert mapping["targets"]["router"] == 6
    assert mapping["new"] == {"router": 6, "connector": 4}


def test_the_receipt_has_the_hash_of_every_other_file(receipt, upcycled):
    made_last = ("upcycle_receipt.json", "README.md")  # the card tells of the receipt
    files = {file for file in upcycled.iterdir() if file.name not in made_last}
    assert receipt["files_sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_one_seed_gives_one_file_and_another_seed_another(arguments, tmp_path, upcycled):
    def weights(**changes):
        out = upcycle(arguments(**ALL_SPARSE, **changes))
        return json.loads((out / "upcycle_receipt.json").read_text())["files_sha256"]["model.safetensors"]

    first = json.loads((upcycled / "upcycle_receipt.json").read_text())["files_sha256"]["model.safetensors"]
    assert weights(output_dir=tmp_path / "same") == first
    assert weights(output_dir=tmp_path / "other", seed=1) != first


def test_a_dry_run_writes_nothing_and_says_what_would_be(arguments, leaves_nothing):
    with leaves_nothing():
        text = preview(arguments(**ALL_SPARSE, dry_run=True, output_dir=None))
        with pytest.raises(ValueError, match=r"dry_run is set.*preview"):
            upcycle(arguments(dry_run=True))
    stack = "model.language_model.layers.*.mlp.experts.gate_up_proj [8, 96, 32]"
    assert f"experts 3 x {stack} float32 of gate_proj.weight + up_proj.weight" in text
    assert "the dense connector that these are made of is drawn" in text
    assert text.splitlines()[-1].endswith("753 kB")


def test_a_dry_run_checks_the_output_folder_too(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ValueError, match=r"is not empty"):
        preview(arguments())


def test_an_output_folder_is_replaced_when_forced(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ValueError, match=r"is not empty.*--force"):
        upcycle(arguments())
    out = upcycle(arguments(force=True))
    assert not (out / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_leaves_nothing(arguments, monkeypatch, leaves_nothing, where):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(WrittenFile, "write", full) if where == "write" else monkeypatch.setattr("os.fsync", full)
    with leaves_nothing(), pytest.raises(OSError, match=r"The disk is full.* needs about"):
        upcycle(arguments())


def test_an_interruption_leaves_nothing(arguments, monkeypatch, leaves_nothing):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(WrittenFile, "write", interrupt)
    with leaves_nothing(), pytest.raises(KeyboardInterrupt):
        upcycle(arguments())


def remap(plan, named):
    from modeling_vlmoe import VLMoEForConditionalGeneration
    from modeling_vlmoe.conversion.meta_models import build_on_meta

    sparse = build_on_meta(lambda: VLMoEForConditionalGeneration(plan.config))
    return map_tensors(named, plan.mlps, sparse, plan.dtype, {})


def test_raises_when_a_dense_tensor_is_used_twice(arguments):
    plan = plan_upcycle(arguments())
    twice = {
        "model.language_model.norm.weight": plan.dense_tensors["model.language_model.layers.0.input_layernorm.weight"]
    }
    with pytest.raises(ValueError, match=r"model.layers.0.input_layernorm.weight would be used twice"):
        remap(plan, plan.dense_tensors | twice)


def test_raises_when_a_dense_tensor_is_left_over(arguments):
    plan = plan_upcycle(arguments())

    class Extra:
        def dtype(self, name):
            return torch.float32

        def shape(self, name):
            return (1,)

    with pytest.raises(ValueError, match=r"no place for 1 dense tensors: somewhere"):
        remap(plan, plan.dense_tensors | {"somewhere": DenseTensor(Extra(), "x")})


def test_raises_when_nothing_fills_a_target(arguments):
    plan = plan_upcycle(arguments())
    named = {name: dense for name, dense in plan.dense_tensors.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"Nothing in the parents fills lm_head.weight"):
        remap(plan, named)


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5 B"), (1234, "1.23 kB"), (7_170_000_000, "7.17 GB"), (664_096, "664 kB")]
)
def test_bytes_are_said_shortly(count, text):
    assert format_bytes(count) == text
