"""Every router in every part where it is allowed: forward, backward, generate, saving, compiling, kernels."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.parts import blocks_of
from modeling_vlmoe.recorders import forget_recorders
from modeling_vlmoe.router_losses import RouterContext
from modeling_vlmoe.routers import Router
from tests.models import batch, gap, sparse_config, sparse_model
from tests.routers import ROUTERS

KERNELS = ("eager", "batched_mm", "grouped_mm")


def make(name, **more):
    """A model with this router wherever it is allowed, with biases that change choices."""
    model = sparse_model(**ROUTERS[name].parts_fields(**more))
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, Router) and module.expert_bias is not None:
            module.expert_bias.normal_(generator=generator)
    return model


def inputs_of(name):
    inputs = batch((1, 2))
    row = ROUTERS[name]
    return inputs if row.inputs is None else row.inputs(inputs)


def step(model, inputs):
    """The logits of real tokens and every gradient."""
    model.zero_grad()
    outputs = model(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach()[inputs["attention_mask"].bool()], gradients


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_reach_every_router_and_kernels_agree(name):
    model, inputs = make(name).train(), inputs_of(name)
    found = {}
    for kernel in KERNELS:
        model.set_experts_implementation(kernel)
        found[kernel] = step(model, inputs)
    logits, gradients = found["eager"]
    routers = [name for name, _ in model.named_parameters() if ".router." in name]
    assert len(routers) >= len(blocks_of(model, ROUTERS[name].parts))
    for router in routers:
        assert gradients[router].isfinite().all(), router
        assert gradients[router].abs().max() > 0, router
    for kernel in KERNELS[1:]:
        assert gap(found[kernel][0], logits) <= 1e-5, kernel
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(
                found[kernel][1][parameter], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, p=parameter: f"{p}: {m}"
            )


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_it_generates_and_comes_back_from_a_folder_bit_equal(name, tmp_path):
    model, inputs = make(name), inputs_of(name)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "suppress_tokens": [300]}
    tokens = model.generate(**inputs, **settings, pad_token_id=0)
    assert torch.equal(tokens, model.generate(**inputs, **settings, pad_token_id=0, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()  # where they lie in the file, kernels add up in another order
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def step_of_block(run, block, x):
    """What a block gives in training, and its router's gradient."""
    block.zero_grad()
    out = run(x, RouterContext())[0]
    out.square().sum().backward()
    return out.detach(), block.router.weight.grad.clone()


# The default run takes a part of each router; the blocks of the others differ in their widths.
BLOCKS = [
    pytest.param(name, part, marks=() if part == row.parts[0] else pytest.mark.slow)
    for name, row in ROUTERS.items()
    if row.inputs is None
    for part in row.parts
]


@pytest.mark.parametrize(("name", "part"), BLOCKS)
def test_a_block_compiles_as_one_graph(name, part):
    """In training; whole models are slow."""
    model = make(name)
    forget_recorders(model)  # the host's hooks, which a whole model installs by itself
    _, block = blocks_of(model, [part])[-1]
    x = torch.randn(2, 9, block.router.weight.shape[1])
    torch._dynamo.reset()
    compiled = torch.compile(block.routed, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(*(step_of_block(run, block, x) for run in (compiled, block.routed)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTERS)
def test_whole_models_compile(name):
    model, inputs = make(name).train(), inputs_of(name)
    wanted, gradients = step(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    outputs = compiled(**inputs, labels=inputs["input_ids"])
    outputs.loss.backward()
    assert gap(outputs.logits.detach()[inputs["attention_mask"].bool()], wanted) <= 1e-5
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(parameter).grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ROUTERS)
def test_checkpointed_layers_give_the_same_gradients(name):
    model, inputs = make(name).train(), inputs_of(name)
    wanted, gradients = step(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found, again = step(model, inputs)
    torch.testing.assert_close(found, wanted)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(again[parameter], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_moe": {"router_type": "expert_choice"}}, "text_moe.router_type is 'expert_choice'.*not causal"),
        ({"vision_moe": {"router_type": "expert_choice", "use_expert_bias": True}}, "vision_moe.use_expert_bias"),
        ({"text_moe": {"num_experts": [4, 4, 8]}}, "text_moe.num_experts"),
        ({"vision_moe": {"num_experts": [4, 4, 8]}}, "vision_moe.num_experts"),
        ({"vision_moe": {"num_experts": [1, 4]}}, "vision_moe.num_experts_per_tok is 2"),
        ({"text_moe": {"router_logit_norm": 0.0}}, "text_moe.router_logit_norm"),
        ({"text_moe": {"routed_scaling_factor": [1.0, 2.0]}}, "text_moe.routed_scaling_factor"),
    ],
)
def test_raises_when_a_router_is_not_for_the_part(fields, message):
    with pytest.raises(ValueError, match=message):
        VLMoEForConditionalGeneration(sparse_config(**fields))
