"""LoRA on weights in 4 and 8 bits inside a run: the experts are packed, by type and size, and the loss falls."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from modeling_vlmoe.finetune import finetune, load_finetuned
from modeling_vlmoe.finetune import train as runs
from modeling_vlmoe.quantization import expert_bytes
from modeling_vlmoe.routed_lora import unwrapped
from modeling_vlmoe.sparse_moe import Experts
from modeling_vlmoe.towers import sparse_blocks
from tests.finetune.conftest import save_model
from tests.models import EXPERTS
from tests.slow import often

CODES = {4: torch.uint8, 8: torch.int8}
LINEARS = {4: Linear4bit, 8: Linear8bitLt}
# Packed weights, scales included, beside float32.
MOST_OF_FULL = {8: 0.29, 4: 0.17}


def text_blocks(model):
    return [block for path, block in sparse_blocks(model) if "language_model" in path]


@pytest.mark.parametrize("bits", often([4, 8], 4))
def test_a_run_trains_lora_on_packed_experts(bits, arguments, base, monkeypatch, tmp_path):
    seen = {}
    build = runs.build_trainer

    def watched(*args, **kwargs):
        seen["trainer"] = build(*args, **kwargs)
        return seen["trainer"]

    monkeypatch.setattr(runs, "build_trainer", watched)
    folder = finetune(arguments(quantize_bits=bits, max_steps=12, save_strategy="no", merge=True))
    model = seen["trainer"].model
    whole_model, _ = load_finetuned(base)
    whole = expert_bytes(whole_model)
    blocks = text_blocks(model)
    assert len(blocks) == 3
    for block, size in zip(blocks, [size for name, size in whole.items() if "language_model" in name], strict=True):
        experts = unwrapped(block.experts)[0]
        assert isinstance(experts, Experts)
        codes = dict(experts.parametrizations.named_parameters())
        assert {one.dtype for name, one in codes.items() if name.endswith("original")} == {CODES[bits]}
        held = [*codes.values(), *experts.buffers()]
        assert sum(one.numel() * one.element_size() for one in held) < MOST_OF_FULL[bits] * size
        assert not any(one.requires_grad for one in codes.values())
    linears = [one for name, one in model.named_modules() if isinstance(one, LINEARS[bits])]
    assert len(linears) == 3 * 4
    losses = [entry["loss"] for entry in seen["trainer"].state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    (run,) = json.loads((folder / "training_history.json").read_text())
    assert run["settings"]["quantize_bits"] == bits
    assert sum(part["of"] for part in run["trained"].values()) == sum(one.numel() for one in whole_model.parameters())
    merged, _ = load_finetuned(folder / "merged")  # into the whole weights
    assert all(one.is_floating_point() for one in merged.parameters())


def test_raises_when_packed_weights_would_be_trained_or_saved(arguments):
    for method in ("full", "align", "delta"):
        with pytest.raises(
            ValueError, match=f"method {method} leaves a full checkpoint, and packed weights are neither"
        ):
            arguments(method=method, quantize_bits=4)
    with pytest.raises(ValueError, match="quantize_bits is 3; expected one of 4, 8"):
        arguments(quantize_bits=3)
    with pytest.raises(ValueError, match="LoRA on packed experts has no dropout"):
        arguments(quantize_bits=4, lora_dropout=0.1)


def test_raises_when_packed_experts_are_to_be_trained_whole(arguments):
    given = {"quantize_bits": 8, "train": ["experts"], "lora_targets": ["attention"]}
    with pytest.raises(ValueError, match=r"part experts, of which nothing can be trained: .* it is packed"):
        finetune(arguments(**given))


def test_raises_when_delta_experts_are_to_be_packed(arguments, tmp_path):
    delta = EXPERTS | {"expert_type": "delta", "expert_rank": 2}
    folder = save_model(tmp_path / "delta", text_moe=delta, vision_moe=None, connector_moe=None)
    with pytest.raises(ValueError, match=r"quantize_bits 4 needs experts with weights of their own.*vlmoe densify"):
        finetune(arguments(model=str(folder), quantize_bits=4))
    assert not (tmp_path / "out").exists()
