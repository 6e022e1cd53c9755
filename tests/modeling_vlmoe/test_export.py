"""`torch.export` and ONNX: what is exported computes what the model computes, experts and images included."""

import pytest
import torch

from tests.models import batch, gap, sparse_model

KERNELS = ("batched_mm", "grouped_mm")
NO_CACHE = {"use_cache": False}


def exportable(kernel):
    model = sparse_model()
    model.set_experts_implementation(kernel)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_exported_program_computes_what_the_model_computes(kernel):
    model, inputs = exportable(kernel), batch((1, 1))
    program = torch.export.export(model, (), kwargs=inputs | NO_CACHE, strict=False).module()
    # Other values of the same shapes: other experts are chosen.
    others = inputs | {"pixel_values": inputs["pixel_values"].flip(0) * 2, "input_ids": inputs["input_ids"].flip(0)}
    for given in (inputs, others):
        assert gap(program(**given, **NO_CACHE).logits, model(**given).logits) <= 1e-5
    assert gap(model(**others).logits, model(**inputs).logits) > 1e-2


@torch.no_grad()
def test_onnx_computes_what_the_model_computes(tmp_path):
    """By the host's exporter, run by onnxruntime."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    model, inputs = exportable("batched_mm"), batch((1, 1))
    exported = OnnxExporter().export(model, inputs | NO_CACHE, config=OnnxConfig(dynamic=False))
    others = inputs | {"pixel_values": inputs["pixel_values"].flip(0) * 2}
    for given in (inputs, others):
        assert gap(exported(**given).logits, model(**given).logits) <= 1e-4
    exported.save_pretrained(tmp_path)
    assert (tmp_path / "model.onnx").stat().st_size > 0
