"""Upcycling into routers that read text, and what is refused of them."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe import mark_visible_text
from modeling_vlmoe.conversion import ExportArguments, UpcycleArguments, export, upcycle
from modeling_vlmoe.conversion.upcycle import preview
from modeling_vlmoe.text_gate import TextGate
from tests import hosts, tiny
from tests.modeling_vlmoe.test_visible_text import HOST_CHATML

GATED = {"text_experts": None, "vision_experts": 3, "connector_experts": 4}
GATED |= {"vision_router": "attention", "connector_router": "attention"}
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour?"}]}]


@pytest.fixture(scope="module")
def gated(parents, tmp_path_factory):
    """A Llama + SigLIP checkpoint whose ViT and connector route by the text, to be read only."""
    out = tmp_path_factory.mktemp("gated") / "model"
    towers = {"text_model": str(parents / "llama"), "vision_model": str(parents / "siglip")}
    return upcycle(UpcycleArguments(**towers, output_dir=str(out), **GATED))


@pytest.fixture(scope="module")
def gated_host(tmp_path_factory):
    """Gives a dense Qwen2.5-VL's folder, and that of the same with text gates, to be read only."""
    root = tmp_path_factory.mktemp("host")
    dense = hosts.save(root / "dense", "qwen2_5_vl")
    template = HOST_CHATML.replace("IMAGE", repr(hosts.HOSTS["qwen2_5_vl"].place))
    (dense / "chat_template.jinja").write_text(template)
    given = {"vlm_model": str(dense), "output_dir": str(root / "sparse")}
    return dense, upcycle(UpcycleArguments(**given, **GATED))


def inputs_of(processor):
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    return processor(text=text, images=Image.new("RGB", (48, 40)), return_tensors="pt")


def gates_of(model):
    return [one for one in model.modules() if isinstance(one, TextGate)]


def test_the_checkpoint_has_gates_that_are_silent_at_first(gated):
    model, info = AutoModelForImageTextToText.from_pretrained(gated, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.vision_moe.router_type == model.config.connector_moe.router_type == "attention"
    gates = gates_of(model)
    assert len(gates) == len(model.config.vision_moe.layers) + 1
    for gate in gates:
        assert gate.readout.eq(0).all()
        assert 0.8 < gate.queries.std() < 1.2
        bound = gate.keys.shape[1] ** -0.5
        for weight in (gate.keys, gate.values):
            assert 0.5 * bound < weight.std() < weight.abs().max() <= bound
    receipt = json.loads((gated / "upcycle_receipt.json").read_text())
    assert receipt["settings"]["vision_moe"]["router_text_size"] == 64
    assert receipt["mapping"]["targets"]["queries"] == len(gates)


def test_its_processor_marks_the_text_and_the_model_reads_it(gated):
    processor, model = AutoProcessor.from_pretrained(gated), AutoModelForImageTextToText.from_pretrained(gated)
    assert processor.marks_visible_text
    inputs = inputs_of(processor)
    assert 3 in inputs["mm_token_type_ids"]
    before = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert before.shape[1] == inputs["input_ids"].shape[1] + 3
    tiny.redraw(model)
    for gate in gates_of(model):
        gate.readout.data *= 20
    wanted = model(**inputs, output_router_logits=True).connector_router_logits[0]
    inputs["input_ids"] = torch.where(inputs["mm_token_type_ids"] == 3, 50, inputs["input_ids"])
    assert not torch.equal(model(**inputs, output_router_logits=True).connector_router_logits[0], wanted)


@pytest.mark.slow
def test_it_is_loaded_where_the_package_is_not_installed(gated, run_without_package):
    said = run_without_package(
        "import torch\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(gated)!r}, trust_remote_code=True)\n"
        f"processor = AutoProcessor.from_pretrained({str(gated)!r}, trust_remote_code=True)\n"
        "inputs = processor(text='<image> which?', images=Image.new('RGB', (24, 24)), return_tensors='pt')\n"
        "print(model.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] - inputs['input_ids'].shape[1])"
    )
    assert said.split()[-1] == "2"


@torch.no_grad()
def test_a_hosts_vlm_computes_what_it_did(gated_host):
    dense, sparse = gated_host
    processor = mark_visible_text(hosts.processor("qwen2_5_vl"))
    processor.chat_template = (dense / "chat_template.jinja").read_text()
    inputs = inputs_of(processor)
    assert 3 in inputs["mm_token_type_ids"]
    made, parent = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (sparse, dense))
    wanted = parent(**inputs | {"mm_token_type_ids": (inputs["mm_token_type_ids"] == 1).long()}).logits
    torch.testing.assert_close(made(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert gates_of(made)


def test_what_would_be_written_is_said(arguments):
    said = preview(arguments(**GATED))
    assert "zeros   model.connector.mlp.router.text_gate.readout" in said
    assert "queries 2 x model.vision_tower.encoder.layers.*.mlp.router.text_gate.queries" in said


def test_export_is_refused_for_image_parts_and_not_for_the_lm_alone(gated, tmp_path):
    with pytest.raises(ValueError, match="serving engines, and transformers' own classes, encode images without any"):
        export(ExportArguments(checkpoint=str(gated), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    export(ExportArguments(checkpoint=str(gated), output_dir=str(tmp_path / "lm"), to="text"))


def test_export_of_a_hosts_vlm_is_refused(gated_host, tmp_path):
    with pytest.raises(ValueError, match="encode images without any text"):
        export(ExportArguments(checkpoint=str(gated_host[1]), output_dir=str(tmp_path / "out")))


def test_raises_when_a_native_checkpoint_is_asked_for(arguments):
    with pytest.raises(ValueError, match="encode images without any text"):
        upcycle(arguments(**GATED, format="native"))


def test_raises_when_the_part_stays_dense(arguments):
    with pytest.raises(ValueError, match="--vision-router is given, but this part stays dense"):
        upcycle(arguments(text_experts=4, vision_router="attention"))


def test_raises_when_the_router_is_not_known(arguments):
    with pytest.raises(ValueError, match="router_type"):
        upcycle(arguments(vision_experts=4, vision_router="attentive"))


def test_raises_when_a_hosts_processor_could_not_mark(tmp_path):
    dense = hosts.save(tmp_path / "dense", "qwen2_5_vl")
    for file in dense.glob("chat_template*"):
        file.unlink()
    given = {"vlm_model": str(dense), "output_dir": str(tmp_path / "sparse")}
    with pytest.raises(ValueError, match="has no chat template, by which the assistant's turns are told"):
        upcycle(UpcycleArguments(**given, **GATED))
