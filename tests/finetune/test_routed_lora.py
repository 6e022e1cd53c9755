"""LoRA on experts by our path equals PEFT's, in what it computes, in gradients and in files; where it cannot, PEFT's
own runs.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from modeling_vlmoe import adapted_experts, routed_lora, shared_base
from modeling_vlmoe.routed_lora import is_wrapper, set_expert_dropout, unwrapped
from modeling_vlmoe.towers import sparse_blocks
from tests import models
from tests.modeling_vlmoe.expert_oracles import DENSE_MLPS, block
from tests.models import batch

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@torch.no_grad()
def redraw(model, name="default", seed=0):
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if "lora_" in path and f".{name}." in path:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(model, targets=STACKS, rank=3, **fields):
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=5, target_modules=[], target_parameters=targets, **fields)
    )
    redraw(model)
    return model


@torch.no_grad()
def make_copies(model):
    """Every expert the first one, as upcycling leaves them."""
    for _, made in sparse_blocks(model):
        for value in made.experts.parameters():
            value.copy_(value[:1].expand_as(value))
    return model


@pytest.fixture
def kernels(monkeypatch):
    """Which of our kernels ran."""
    ran = []
    for name in ("run_shared_base", "run_grouped"):
        kernel = getattr(adapted_experts, name)
        monkeypatch.setattr(adapted_experts, name, lambda *a, name=name, kernel=kernel: ran.append(name) or kernel(*a))
    return ran


def passed(model, enabled, inputs):
    """(logits, gradients by name) of one training pass."""
    model.zero_grad()
    model.train()
    with routed_lora.routed_lora(enabled):
        logits = model(**inputs).logits
        logits[inputs["attention_mask"].bool()].square().mean().backward()
    return logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def assert_same_passes(model, inputs):
    (logits, found), (wanted_logits, wanted) = (passed(model, enabled, inputs) for enabled in (True, False))
    torch.testing.assert_close(logits, wanted_logits, rtol=1e-5, atol=1e-5 * wanted_logits.std().item())
    assert found.keys() == wanted.keys()
    assert any("lora_" in name for name in found)
    for name, one in wanted.items():
        assert (found[name] - one).abs().max() <= 1e-5 * max(0.1, one.abs().max()), name


@pytest.mark.parametrize("targets", [STACKS, STACKS[:2], STACKS[2:]], ids=["all", "first", "second"])
@pytest.mark.parametrize("are_copies", [False, True], ids=["unlike", "copies"])
def test_results_and_gradients_are_pefts(are_copies, targets, kernels):
    model = models.sparse_model()
    model = adapted(make_copies(model) if are_copies else model, targets, use_rslora=True)
    assert_same_passes(model, batch((1, 2)))
    assert set(kernels) == {"run_shared_base" if are_copies else "run_grouped"}


@pytest.mark.parametrize(("rank", "most_stacked"), [(3, 256), (4, 0)], ids=["each expert apart", "several at once"])
@pytest.mark.parametrize("are_copies", [False, True], ids=["unlike", "copies"])
@pytest.mark.parametrize("kind", DENSE_MLPS, ids=str)
def test_every_kind_of_mlp(kind, are_copies, rank, most_stacked, kernels, monkeypatch):
    monkeypatch.setattr(shared_base, "MOST_STACKED", most_stacked)
    made = block(DENSE_MLPS[kind]())
    if are_copies:
        make_copies(made)
    names = [f"experts.{name}" for name in made.experts.stacks]
    model = adapted(torch.nn.ModuleDict({"block": made}), names, rank)
    results = []
    for enabled in (True, False):
        model.zero_grad()
        x = torch.randn(31, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with routed_lora.routed_lora(enabled):
            out = model.base_model.model["block"](x)
            out.square().sum().backward()
        results.append([out.detach(), x.grad, *(one.grad for one in model.parameters() if one.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, other.abs().max().item()))
    assert kernels == ["run_shared_base" if are_copies else "run_grouped"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_whatever_kernel_is_named(implementation, kernels):
    model = adapted(models.sparse_model())
    model.base_model.model.set_experts_implementation(implementation)
    assert_same_passes(model, batch())
    assert kernels


def test_gradient_checkpointing_and_trained_weights_beside(kernels):
    model = adapted(models.sparse_model())
    for name, one in model.named_parameters():
        one.requires_grad_(one.requires_grad or "experts" in name)
    model.base_model.model.activation_checkpointing_enable()
    assert_same_passes(model, batch())
    assert set(kernels) == {"run_grouped"}


def test_copies_that_are_trained_are_no_longer_shared(kernels):
    model = make_copies(models.sparse_model())
    model = adapted(model)
    model(**batch())
    assert set(kernels) == {"run_shared_base"}
    experts = [unwrapped(made.experts)[0] for _, made in sparse_blocks(model)]
    with torch.no_grad():
        for one in experts:
            one.down_proj[1, 3, 2] += 1.0
    kernels.clear()
    assert_same_passes(model, batch())
    assert set(kernels) == {"run_grouped"}


def test_copies_that_are_merged_into_are_no_longer_shared(kernels):
    """PEFT writes past autograd's notice."""
    model = adapted(make_copies(models.sparse_model()))
    model(**batch())
    again = adapted(model.merge_and_unload())
    kernels.clear()
    assert_same_passes(again, batch())
    assert set(kernels) == {"run_grouped"}


@pytest.mark.parametrize("are_copies", [False, True], ids=["unlike", "copies"])
def test_weights_made_for_inference_alone(are_copies, kernels):
    with torch.inference_mode():
        model = models.sparse_model()
        model = adapted(make_copies(model) if are_copies else model)
        found = model(**batch()).logits
        with routed_lora.routed_lora(False):
            torch.testing.assert_close(found, model(**batch()).logits, rtol=1e-5, atol=1e-4)
    assert kernels


def test_hooks_on_wrappers_are_called_backward_too(kernels):
    model = adapted(models.sparse_model())
    wrappers = [module for module in model.modules() if is_wrapper(module)]
    called = []
    for wrapper in wrappers:
        wrapper.register_full_backward_hook(lambda *args: called.append(1))
    model(**batch()).logits.sum().backward()
    assert len(called) == len(wrappers)
    assert not kernels


def test_files_are_pefts(tmp_path):
    model = adapted(models.sparse_model())
    passed(model, True, batch())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models.sparse_model(), tmp_path / "adapter").eval()
    with torch.no_grad(), routed_lora.routed_lora(False):
        torch.testing.assert_close(loaded(**batch()).logits, model.eval()(**batch()).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_switching_merging_and_unloading_are_pefts(kernels):
    plain = models.sparse_model()(**batch()).logits
    model = adapted(models.sparse_model()).eval()
    tuned = model(**batch()).logits
    assert (tuned - plain).abs().max() > 1e-2
    kernels.clear()
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, plain)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch()).logits, tuned, rtol=1e-4, atol=1e-4)
    assert not kernels
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch()).logits, tuned, rtol=1e-4, atol=1e-4)
    assert kernels
    merged = model.merge_and_unload()
    assert not any(map(is_wrapper, merged.modules()))
    torch.testing.assert_close(merged(**batch()).logits, tuned, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_several_adapters_are_left_to_peft(kernels):
    model = adapted(models.sparse_model())
    model.add_adapter("other", LoraConfig(r=3, target_modules=[], target_parameters=STACKS))
    redraw(model, "other", seed=1)
    model.eval().set_adapter("other")
    assert_same = model(**batch()).logits
    assert kernels
    with routed_lora.routed_lora(False):
        torch.testing.assert_close(model(**batch()).logits, assert_same, rtol=1e-5, atol=1e-5)
    kernels.clear()
    model.base_model.set_adapter(["default", "other"])
    model(**batch())
    assert not kernels


def test_the_environment_switches_it_off(kernels, monkeypatch):
    monkeypatch.setenv(routed_lora.SWITCH, "0")
    model = adapted(models.sparse_model())
    model(**batch())
    assert not kernels
    with routed_lora.routed_lora(True):
        model(**batch())
    assert kernels


# Dropout


@pytest.mark.parametrize("are_copies", [False, True], ids=["unlike", "copies"])
def test_dropout_has_the_gradients_of_what_it_computes(are_copies):
    made = block(DENSE_MLPS["gated with biases"]())
    made = (make_copies(made) if are_copies else made).double()
    made.router.float()
    model = adapted(torch.nn.ModuleDict({"block": made}), ["experts.gate_up_proj", "experts.down_proj"])
    set_expert_dropout(model, 0.4)
    model.train()
    x = torch.randn(12, 16, dtype=torch.float64)
    trained = [one for name, one in model.named_parameters() if "lora_" in name]

    def loss():
        torch.manual_seed(5)
        return model.base_model.model["block"](x).square().sum()

    found = torch.autograd.grad(loss(), trained)
    for parameter, gradient in zip(trained, found, strict=True):
        way = torch.randn(parameter.shape, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter += step * way
                values.append(loss())
            parameter += 1e-6 * way
        measured = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(measured, (gradient * way).sum(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("are_copies", [False, True], ids=["unlike", "copies"])
def test_dropout_is_for_training_and_keeps_the_mean(are_copies):
    made = block(DENSE_MLPS["gated"]())
    model = adapted(torch.nn.ModuleDict({"block": make_copies(made) if are_copies else made}), ["experts.down_proj"])
    x = torch.randn(5, 16)
    run = model.base_model.model["block"]
    wanted = run(x)
    set_expert_dropout(model, 0.5)
    torch.testing.assert_close(model.eval().base_model.model["block"](x), wanted)
    model.train()
    several = torch.stack([run(x) for _ in range(2000)])
    assert several.std(0).max() > 1e-3
    error = (several.mean(0) - wanted).abs() / (several.std(0) / 2000**0.5 + 1e-6)
    assert error.max() < 6


def test_raises_when_peft_is_to_run_dropout():
    model = adapted(models.sparse_model())
    set_expert_dropout(model, 0.1)
    model.train()
    with routed_lora.routed_lora(False), pytest.raises(ValueError, match="which has no dropout on stacks of weights"):
        model(**batch())
    model.eval()(**batch())


def test_raises_when_dropout_cannot_be():
    with pytest.raises(ValueError, match=r"lora_dropout is 1.5; expected 0 or more, and less than 1"):
        set_expert_dropout(models.sparse_model(), 1.5)
    with pytest.raises(ValueError, match="No experts of this model are adapted"):
        set_expert_dropout(models.sparse_model(), 0.5)


# What the host does around it


def test_adapters_beside_bf16_weights(kernels):
    model = adapted(models.sparse_model().bfloat16())
    inputs = batch() | {"pixel_values": batch()["pixel_values"].bfloat16()}
    (logits, found), (wanted_logits, wanted) = (passed(model, enabled, inputs) for enabled in (True, False))
    assert kernels
    real = inputs["attention_mask"].bool()
    assert (logits - wanted_logits)[real].abs().max() <= 0.1 * wanted_logits[real].abs().max()
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in wanted.items()}


@torch.no_grad()
def test_generation_gives_the_same_tokens():
    model = adapted(models.sparse_model()).eval()
    tokens = []
    for enabled in (True, False):
        with routed_lora.routed_lora(enabled):
            tokens.append(model.generate(**batch(), max_new_tokens=6, do_sample=False))
    assert torch.equal(*tokens)


def test_peft_is_as_it_is_read():
    """What `run_experts` reads of PEFT's wrappers, version by version: where this fails, PEFT's own path runs."""
    model = adapted(models.sparse_model())
    wrappers = [module for module in model.modules() if is_wrapper(module)]
    assert len(wrappers) == 2 * len(sparse_blocks(model))
    for wrapper in wrappers:
        assert all(hasattr(wrapper, name) for name in routed_lora.READ)
        b, a, scaling = wrapper.get_delta_factors("default")
        delta = wrapper.get_delta_weight("default")
        torch.testing.assert_close(scaling * b @ a, delta, rtol=1e-5, atol=1e-6)


def test_adapted_models_load_as_ever(tmp_path):
    config = models.sparse_model()
    config.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch()).logits, model.eval()(**batch()).logits, rtol=1e-5, atol=1e-5)
