"""Weights in 8 and 4 bits: what is packed really is, the rest is not, and the packed model computes with the packed
weights.
"""

import copy
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from modeling_vlmoe.finetune import lora_config
from modeling_vlmoe.quantization import (
    BITS,
    INT8_MAX,
    NF4_BLOCK,
    VLMoEQuantizationConfig,
    expert_bytes,
    quantize_experts,
    skipped_modules,
)
from modeling_vlmoe.sparse_moe import Experts
from tests.models import EXPERTS, batch, gap, sparse_model

LINEARS = {4: Linear4bit, 8: Linear8bitLt}
CODES = {4: torch.uint8, 8: torch.int8}
NF4_LARGEST_STEP = 1 - 0.6961928009986877  # between the two outermost of NF4's values, for blocks scaled to 1
KERNELS = ("eager", "batched_mm", "grouped_mm")
# Quantised weights, scales included, beside float32: 1 byte and a scale per row; half a byte and a scale per block.
MOST_OF_FULL = {8: 0.29, 4: 0.17}


@pytest.fixture(scope="module")
def full():
    return sparse_model()


@pytest.fixture(scope="module")
def saved(full, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    full.save_pretrained(folder)
    return folder


def load(folder, bits, parts=("text",), **kwargs):
    config = VLMoEQuantizationConfig(bits, parts)
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, **kwargs)


def load_full(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def weights(experts):
    """The stacks as they are computed with, and their biases."""
    names = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
    return {name: getattr(experts, name).detach() for name in names if hasattr(experts, name)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", ["loaded", "in memory"])
def test_the_llms_experts_are_packed_and_routers_vit_and_head_are_not(full, saved, bits, way):
    model = load(saved, bits) if way == "loaded" else quantize_experts(copy.deepcopy(full), bits)
    packed = {name: p.dtype for name, p in model.named_parameters() if "parametrizations" in name}
    assert len(packed) == 2 * full.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.") for name in packed)
    assert set(packed.values()) == {CODES[bits]}
    for name, parameter in model.named_parameters():
        is_kept = name.startswith(("model.vision_tower.", "model.connector.", "lm_head."))
        if is_kept or ".router." in name or "norm" in name:
            assert parameter.dtype == torch.float32, name
            assert torch.equal(parameter, full.get_parameter(name)), name
    linears = {
        type(child) for name, child in model.model.language_model.named_modules() if isinstance(child, nn.Linear)
    }
    assert linears == {LINEARS[bits] if way == "loaded" else nn.Linear}


@pytest.mark.parametrize("bits", BITS)
def test_packed_experts_take_the_bytes_they_should(full, bits):
    before = {name: size for name, size in expert_bytes(full).items() if "language_model" in name}
    after = expert_bytes(quantize_experts(copy.deepcopy(full), bits))
    assert len(before) == 3
    for name, size in before.items():
        stacks = weights(full.get_submodule(name))
        assert size == 4 * sum(stack.numel() for stack in stacks.values())
        assert after[name] < MOST_OF_FULL[bits] * size
    assert {name: size for name, size in after.items() if name not in before} == {
        name: size for name, size in expert_bytes(full).items() if name not in before
    }


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", ["loaded", "in memory"])
def test_weights_are_off_by_half_a_step_at_most(full, saved, bits, way):
    parts = ("text", "vision", "connector")
    model = load(saved, bits, parts) if way == "loaded" else quantize_experts(copy.deepcopy(full), bits, parts)
    for name, experts in experts_of(full).items():
        found = weights(model.get_submodule(name))
        for stack, wanted in weights(experts).items():
            if stack.endswith("_bias"):
                assert torch.equal(found[stack], wanted)
                continue
            if bits == 8:
                half_step = wanted.abs().amax(-1, keepdim=True) / INT8_MAX / 2
            else:
                blocks = wanted.reshape(-1, NF4_BLOCK)
                half_step = (blocks.abs().amax(-1, keepdim=True) * NF4_LARGEST_STEP / 2).expand_as(blocks)
                half_step = half_step.reshape(wanted.shape)
            error = (found[stack] - wanted).abs()
            assert (error <= half_step * 1.001).all(), (name, stack)
            assert error.max() > 0


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", BITS)
def test_the_packed_model_is_the_full_one_with_rounded_weights(full, bits, kernel):
    """The oracle: a full-precision model that is given the packed model's weights."""
    parts = ("text", "vision", "connector")
    packed = quantize_experts(copy.deepcopy(full), bits, parts)
    rounded = copy.deepcopy(full)
    for name, experts in experts_of(rounded).items():
        for stack, value in weights(packed.get_submodule(name)).items():
            getattr(experts, stack).copy_(value)
    for model in (packed, rounded):
        model.set_experts_implementation(kernel)
    inputs = batch((1, 2))
    real = inputs["attention_mask"].bool()
    assert gap(packed(**inputs).logits[real], rounded(**inputs).logits[real]) <= 1e-6
    assert gap(packed(**inputs).logits[real], full(**inputs).logits[real]) > 1e-3


@torch.no_grad()
def test_a_kernel_unpacks_a_weight_once_per_pass(full, monkeypatch):
    from modeling_vlmoe.quantization import Int8Rows

    packed = quantize_experts(copy.deepcopy(full), 8)
    packed.set_experts_implementation("eager")
    ran = []
    unpack = Int8Rows.forward
    monkeypatch.setattr(Int8Rows, "forward", lambda self, codes: ran.append(self) or unpack(self, codes))
    packed(**batch((0,)))
    assert len(ran) == len(set(ran)) == 6
    from torch.nn.utils import parametrize

    assert (parametrize._cache_enabled, parametrize._cache) == (0, {})


@pytest.mark.parametrize("bits", BITS)
def test_loading_packs_each_stack_as_it_is_read(saved, bits, monkeypatch):
    """No more than one stack is unpacked at a time: each is packed before the next one is put into the model."""
    from modeling_vlmoe import quantization

    pack, most = quantization.pack, []

    def watched(experts, name, bits):
        pack(experts, name, bits)
        full = [stack for stack, p in experts.named_parameters() if p.ndim == 3 and p.is_floating_point()]
        most.append([stack for stack in full if not experts.get_parameter(stack).is_meta])

    monkeypatch.setattr(quantization, "pack", watched)
    load(saved, bits)
    assert most == [[]] * 6


@torch.no_grad()
def rounded_like(packed, full):
    """The full model with the weights that the packed one computes with."""
    wanted = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in experts_of(packed).items()
    }
    for name, experts in experts_of(full).items():
        for stack, value in weights(wanted[name]).items():
            getattr(experts, stack).copy_(value)
    return full


def trained(model, config, steps=3):
    """The model with LoRA, its losses step by step, and the LoRA tensors' gradients of the last."""
    torch.manual_seed(0)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    learning = {name: parameter for name, parameter in tuned.named_parameters() if "lora_" in name}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    inputs, losses, gradients = batch((1, 1)), [], {}
    for _ in range(steps):
        loss = tuned(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in learning.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return tuned, losses, gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bits", BITS)
def test_lora_on_packed_experts_is_lora_on_their_rounded_weights(saved, bits, checkpointing, tmp_path):
    packed = quantize_experts(load_full(saved), bits)
    rounded = rounded_like(packed, load_full(saved))
    if checkpointing:
        for model in (packed, rounded):
            model.activation_checkpointing_enable({"use_reentrant": False})
    config = lora_config(packed, lora_r=2, lora_targets=["experts"], train_routers=False)
    assert config.target_parameters == lora_config(rounded, lora_r=2, lora_targets=["experts"]).target_parameters
    tuned, losses, gradients = trained(packed, config)
    _, wanted_losses, wanted_gradients = trained(rounded, config)
    assert len(gradients) == 4 * len(packed.config.text_moe.layers)
    assert all("language_model" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantize_experts(load_full(saved), bits), tmp_path)
    inputs = batch((1, 1))
    with torch.no_grad():
        assert gap(again.eval()(**inputs).logits, tuned.eval()(**inputs).logits) <= 1e-6
        unpacked = PeftModel.from_pretrained(rounded_like(again, load_full(saved)), tmp_path).eval()
        assert gap(unpacked(**inputs).logits, tuned(**inputs).logits) <= 1e-5  # it fits unpacked experts too
    with pytest.raises(ValueError, match="Load the model without quantization"):
        again.merge_and_unload()


def test_an_adapter_that_misses_packed_experts_is_told_how_to_find_them(saved, caplog):
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=r".*vision_tower.*|.*connector.*")
    tuned = get_peft_model(quantize_experts(load_full(saved), 8), config).train()
    with caplog.at_level(logging.WARNING):
        tuned(**batch((1,)))
    assert "PEFT finds packed experts by their full names alone" in caplog.text


@pytest.mark.parametrize("way", ["loaded", "in memory"])
def test_raises_when_a_packed_model_is_saved(full, saved, way, tmp_path):
    model = load(saved, 8) if way == "loaded" else quantize_experts(copy.deepcopy(full), 8)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_leaves_experts_out_is_warned_of(saved, caplog):
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped_modules())
    with caplog.at_level(logging.WARNING):
        model = AutoModelForImageTextToText.from_pretrained(saved, quantization_config=config)
    assert "reached the Linears only" in caplog.text
    caplog.clear()
    quantize_experts(model, 4)
    for bits in BITS:
        load(saved, bits)
    assert "reached the Linears only" not in caplog.text
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained("never")


TORCHAO_LINEARS = """
import sys
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForImageTextToText, TorchAoConfig
from modeling_vlmoe.quantization import quantize_experts, skipped_modules
from tests.models import batch, gap
from tests.modeling_vlmoe.test_quantization import experts_of, weights

torch.set_grad_enabled(False)
config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped_modules())
load = lambda: AutoModelForImageTextToText.from_pretrained(sys.argv[1], quantization_config=config)
model, rounded = quantize_experts(load(), 8), load()
for name, experts in experts_of(rounded).items():
    for stack, value in weights(model.get_submodule(name)).items():
        getattr(experts, stack).copy_(value)
inputs = batch((1,))
layer, vision = model.model.language_model.layers[0], model.model.vision_tower.encoder.layers[0]
print(
    type(layer.self_attn.q_proj.weight).__name__,
    layer.mlp.experts.parametrizations.down_proj.original.dtype,
    type(vision.self_attn.q_proj.weight).__name__,
    gap(model(**inputs).logits, rounded(**inputs).logits) <= 1e-6,
)
"""


def test_torchaos_linears_go_with_our_experts(saved, run_python):
    """torchao stands apart from the environment: every process that finds it imports it, which prints and takes
    seconds. `make` puts it there.
    """
    apart = Path(sys.prefix) / "torchao"
    if not apart.is_dir():
        pytest.fail(f"torchao is not in {apart}. Run `make test`, or pip install --no-deps --target {apart} torchao")
    root = Path(__file__).parents[2]
    printed = run_python(TORCHAO_LINEARS, {"PYTHONPATH": os.pathsep.join([str(apart), str(root)])}, arguments=[saved])
    assert printed.splitlines()[-1] == "Int8Tensor torch.int8 Parameter True"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits is 3; expected one of 4, 8"),
        ({"parts": ["text", "router"]}, r"parts has \['router'\]"),
        ({"parts": "text"}, "parts has 'text'; expected a list"),
        ({"parts": []}, r"parts has \(\); expected a list"),
    ],
)
def test_raises_when_bits_or_parts_are_unknown(full, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_experts(full, **arguments)
    with pytest.raises(ValueError, match=message):
        VLMoEQuantizationConfig(**arguments)


def test_a_configuration_is_read_back_from_what_it_writes():
    for bits in BITS:
        config = VLMoEQuantizationConfig(bits, iter(["text", "vision"]))
        again = VLMoEQuantizationConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert again.parts == ("text", "vision")
    with pytest.raises(ValueError, match="load_in_4bit is True, but bits is 8"):
        VLMoEQuantizationConfig(bits=8, load_in_4bit=True)


def test_raises_when_there_is_nothing_to_pack(full, monkeypatch):
    with pytest.raises(ValueError, match="no experts in text"):
        quantize_experts(sparse_model(text_moe=None))
    packed = quantize_experts(copy.deepcopy(full), 8)
    with pytest.raises(ValueError, match="packed already"):
        quantize_experts(packed, 4)
    with pytest.raises(ValueError, match="are offloaded"):
        quantize_experts(copy.deepcopy(full).to("meta"), 8)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match="pip install 'vlmoe"):
        quantize_experts(copy.deepcopy(full), 4)


@pytest.mark.parametrize("bits", BITS)
def test_raises_when_delta_experts_are_to_be_packed(bits, tmp_path):
    delta = EXPERTS | {"expert_type": "delta", "expert_rank": 3}
    model = sparse_model(text_moe=delta)
    with pytest.raises(ValueError, match=r"in 8 or 4 bits needs experts with weights of their own.*vlmoe densify"):
        quantize_experts(model, bits)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.language_model.layers.0.mlp.experts .* are delta experts"):
        load(tmp_path, bits)
