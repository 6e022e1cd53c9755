"""Memory plans know of every method, of what `train` names and of packed weights."""

import pytest
import torch

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.finetune import prepare_model
from modeling_vlmoe.finetune.gpus import CPU
from modeling_vlmoe.finetune.memory_plan import ADAPTER, GRADIENTS, OPTIMIZER, OTHER, WEIGHTS, estimate
from modeling_vlmoe.finetune.planning import plan_recipe
from modeling_vlmoe.quantization import quantize_experts
from tests.finetune.test_memory_plan import EXPERTS, batch, measured, planned, wide_config  # noqa: F401 (a fixture)
from tests.slow import often

LEAN = {"activation_checkpointing": True}
WAYS = {
    "all": ("full", {"method": "full"}),
    "moe-layers": ("full", {"method": "full", "train": ["moe-layers"]}),
    "all-but-vision": ("dense", {"method": "full", "train": ["all-but-vision"]}),
    "delta": ("delta", {"method": "delta"}),
    "lora beside whole parts": ("full", {"train": ["connector", "norms"]}),
}


@pytest.mark.parametrize("way", often(WAYS, "moe-layers", "delta"))
def test_a_plan_is_what_a_step_takes(way, arguments, batch):  # noqa: F811
    experts, given = WAYS[way]
    config, args = wide_config(experts), arguments(**given, **LEAN)
    assert planned(config, args, batch) == pytest.approx(measured(config, args, batch), rel=0.15)


@pytest.mark.parametrize("way", often(WAYS, "moe-layers", "delta"))
def test_gradients_and_states_are_of_what_is_trained(way, arguments, batch):  # noqa: F811
    experts, given = WAYS[way]
    config, args = wide_config(experts), arguments(**given, gradient_accumulation_steps=2)
    plan = estimate(config, args, batch)
    tuned = prepare_model(VLMoEForConditionalGeneration(config), args)
    num_trained = sum(one.numel() for one in tuned.parameters() if one.requires_grad)
    assert plan.num_trained == num_trained
    assert plan.parts[GRADIENTS] == 4 * num_trained
    assert plan.parts[OPTIMIZER] == 8 * num_trained
    assert (plan.parts[ADAPTER] == 0) == (args.method != "lora")


def packed_and_adapted(model, args):
    """Experts packed in memory; the Linears stay as they are."""
    return prepare_model(quantize_experts(model, args.quantize_bits), args)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_experts_are_counted_packed(bits, arguments, batch):  # noqa: F811
    config = wide_config("full")
    args, whole = arguments(quantize_bits=bits, **LEAN), arguments(**LEAN)
    plan, unpacked = estimate(config, args, batch), estimate(config, whole, batch)
    model = VLMoEForConditionalGeneration(config)
    text = model.model.language_model.layers
    sizes = [one.numel() for layer in text for one in layer.mlp.experts.parameters()]
    sizes += [one.weight.numel() for one in text.modules() if isinstance(one, torch.nn.Linear)]
    rate = 4 - (0.5 + 4 / 64) if bits == 4 else 4 - 1
    saved = unpacked.parts[WEIGHTS] - plan.parts[WEIGHTS]
    assert saved == pytest.approx(rate * sum(sizes), rel=0.02)
    of_a_layer = 4 * sum(one.numel() for one in text[0].mlp.experts.parameters())
    assert plan.parts[OTHER] - unpacked.parts[OTHER] == of_a_layer
    linears = 4 * sum(one.weight.numel() for one in text.modules() if isinstance(one, torch.nn.Linear))
    found = measured(config, args, batch, packed_and_adapted) - linears * rate / 4
    assert plan.peak - plan.parts[OPTIMIZER] == pytest.approx(found, rel=0.15)


def test_without_checkpointing_unpacked_experts_stay_until_the_pass_back(arguments, batch):  # noqa: F811
    config = wide_config("full")
    args = arguments(quantize_bits=4)
    whole = estimate(config, arguments(), batch, CPU)
    plan = estimate(config, args, batch, CPU)
    assert plan.parts[OTHER] - whole.parts[OTHER] == 2 * 4 * EXPERTS["full"]["num_experts"] * 3 * 512 * 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "remedies"),
    [
        ("full", ("train=moe-layers", "train=all-but-vision", "method=lora train=null", "method=align train=null")),
        ("delta", ("method=align",)),
    ],
)
def test_what_would_take_less_is_named_for_every_method(method, remedies, base, delta_base):
    model = delta_base if method == "delta" else base
    words = ["use_cpu=true", "per_device_train_batch_size=1", "gradient_accumulation_steps=1"]
    lines = list(plan_recipe(str(model), method, words, 60, 1, (24, 24), 10**6))
    said = "\n".join(lines)
    assert f"{model}, {method}: 1 x 60 tokens" in said
    for remedy in remedies:
        assert f"  {remedy}: " in said
