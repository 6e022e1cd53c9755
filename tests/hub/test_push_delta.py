"""A model with delta experts goes to the Hub small, and is loaded there without the package."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import UpcycleArguments, upcycle
from tests import tiny

LOAD = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
experts = model.model.language_model.layers[0].mlp.experts
assert type(experts).__name__ == "DeltaExperts" and experts.rank == 2, experts
with torch.no_grad():
    print(model(input_ids=torch.arange(6, 12)[None]).logits.abs().sum().item())
"""


@pytest.mark.slow
def test_a_delta_model_is_pushed_and_pulled_by_a_stranger(hub, vlmoe, run_python, tmp_path):
    tiny.save_text_parent(tmp_path / "llm", "llama")
    tiny.save_vision_parent(tmp_path / "vit", "siglip")
    parents = {"text_model": str(tmp_path / "llm"), "vision_model": str(tmp_path / "vit")}
    delta = {"text_experts": 4, "expert_init": "delta", "expert_rank": 2}
    made = upcycle(UpcycleArguments(**parents, **delta, output_dir=tmp_path / "made"))
    vlmoe("push", made, "--repo-id", "alice/delta", env=hub.env())
    assert b"4 experts that share a base, each with pairs of rank 2" in hub.files("alice/delta")["README.md"]
    said = run_python(LOAD, hub.env(), without_package=True, arguments=["alice/delta"])
    model = AutoModelForImageTextToText.from_pretrained(made)
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(6, 12)[None]).logits.abs().sum().item()
    assert abs(float(said.split()[-1]) - wanted) < 1e-3 * wanted
