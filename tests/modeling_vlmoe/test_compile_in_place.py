"""Hosts that are sparse in place compile as the dense hosts do: in one graph where these do."""

import pytest
import torch

from tests.modeling_vlmoe.test_in_place import given, model
from tests.models import gap

SLOW = pytest.mark.slow
# Of a family: whether there is an image, whether the dense host compiles in one graph then (Qwen2.5-VL reads its
# patches' windows off a tensor), and a backend (inductor fails on a dense SmolVLM's patch convolution: torch 2.13).
CASES = [
    ("qwen2_5_vl", False, True, "aot_eager"),
    pytest.param("qwen2_5_vl", False, True, "inductor", marks=SLOW),
    pytest.param("qwen2_5_vl", True, False, "inductor", marks=SLOW),
    pytest.param("smolvlm", True, True, "aot_eager", marks=SLOW),
]


@pytest.mark.parametrize("training", [pytest.param(False, marks=SLOW), True], ids=["inference", "training"])
@pytest.mark.parametrize(("family", "has_image", "is_whole", "backend"), CASES)
def test_compiles_where_the_dense_host_does(family, has_image, is_whole, backend, training):
    made, inputs = model(family).train(training), given(family, (1,))
    if not has_image:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs["labels"] = inputs["input_ids"]
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=is_whole, backend=backend)
    out = compiled(**inputs)  # the first call of all: nothing may need an eager call before
    wanted = made(**inputs)
    assert gap(out.logits, wanted.logits) <= 1e-4
    if not training:
        return
    torch.testing.assert_close(out.aux_loss, wanted.aux_loss, atol=1e-5, rtol=1e-4)
    out.loss.backward()
    found = {name: one.grad.clone() for name, one in made.named_parameters() if one.grad is not None}
    assert any(name.endswith("router.weight") for name in found)
    made.zero_grad()
    wanted.loss.backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, made.get_parameter(name).grad, atol=1e-5, rtol=1e-4)
