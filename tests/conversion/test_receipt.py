"""The receipt: what was judged is told from what was only measured, every cast is named, no path of the machine is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_vlmoe.cli import describe_result
from modeling_vlmoe.conversion import upcycle
from modeling_vlmoe.conversion.gaps import FLOOR_FACTOR, LIMIT, Findings, Gap
from modeling_vlmoe.conversion.receipt import RECEIPT_NAME, describe_parent, describe_proof
from tests import tiny


def read(folder):
    return json.loads((folder / RECEIPT_NAME).read_text())


def cast(parent, source, target, is_exact):
    return {"parent": parent, "source": source, "target": target, "is_exact": is_exact}


def test_the_largest_gap_is_of_what_was_judged():
    findings = Findings({"logits": Gap(2e-5, 3e-5, 1e-5), "features": Gap(1e-6)}, {"stored": 0.5})
    proof = describe_proof(findings)
    assert (proof["largest_gap"], proof["largest_gap_limit"]) == (2e-5, 3e-5)
    assert proof["gaps"] == {
        "logits": {"gap": 2e-5, "limit": 3e-5, "floor": 1e-5},
        "features": {"gap": 1e-6, "limit": LIMIT},
    }
    assert proof["informative"] == {"stored": 0.5}
    assert proof["floor_factor"] == FLOOR_FACTOR


def test_a_result_is_described_by_its_largest_judged_gap_and_the_limit_of_that(tmp_path):
    findings = Findings({"logits": Gap(2e-5, 3e-5, 1e-5)}, {"stored": 0.5})
    receipt = {
        "parameters": {"total": 1000, "active": 10},
        "proof": describe_proof(findings),
        "settings": {"casts": []},
    }
    (tmp_path / RECEIPT_NAME).write_text(json.dumps(receipt))
    assert "proved equal to its parents: largest gap 2.0e-05 standard deviations (limit 3.0e-05)\n" in describe_result(
        tmp_path
    )


def test_a_rounded_parent_is_said_and_measured(arguments, tmp_path):
    text = tiny.save_text_parent(tmp_path / "bf16", "llama", torch.bfloat16)
    out = upcycle(arguments(text_model=text, vision_experts=4))
    receipt = read(out)
    assert receipt["settings"]["casts"] == [cast("vision", "float32", "bfloat16", False)]
    informative = receipt["proof"]["informative"]
    assert 1e-4 < informative["image features, against the parent as it is stored"] < 0.5
    assert not any(what.startswith("text logits") for what in informative)
    assert receipt["proof"]["largest_gap"] <= LIMIT
    said = describe_result(out)
    assert "proved equal to its parents, as rounded: largest gap" in said
    assert "the ViT was rounded from float32 to bfloat16\n" in said


def test_every_dtype_of_a_parent_is_a_cast(copied, arguments):
    text = copied("llama")
    tensors = load_file(text / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
    save_file(tensors, text / "model.safetensors", metadata={"format": "pt"})
    casts = read(upcycle(arguments(text_model=text)))["settings"]["casts"]
    assert casts == [cast("text", "bfloat16", "float32", True), cast("text", "float16", "float32", True)]


@pytest.mark.parametrize("name", ["models--a--b/snapshots/" + "0" * 40, "llama"])
def test_a_folder_under_the_home_is_named_without_its_path(parents, tmp_path, monkeypatch, name):
    import shutil

    from modeling_vlmoe.conversion.parents import open_parent

    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(parents / "llama", tmp_path / name)
    described = describe_parent(open_parent(f"~/{name}", "text"))
    assert described["name"] == name.rpartition("/")[2]
    assert "~" not in json.dumps(described)
