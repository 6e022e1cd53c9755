"""A bias per expert that balances without a loss: whatever trains the model, once per optimizer step."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from modeling_vlmoe import expert_bias
from modeling_vlmoe.expert_bias import even_load
from modeling_vlmoe.finetune.collator import ChatCollator
from modeling_vlmoe.moe_config import PARTS, MoEConfig
from modeling_vlmoe.router_losses import RouterContext
from modeling_vlmoe.routers import Router
from tests import models
from tests.conformance.trainers import chat_rows
from tests.modeling_vlmoe.test_distributed import run
from tests.models import EXPERTS, batch, sparse_model

RATE = 0.125
BIASED = EXPERTS | {"use_expert_bias": True, "expert_bias_update_rate": RATE}
ALL_BIASED = {f"{part}_moe": BIASED for part in PARTS}


def routers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def biases(model):
    return {name: router.expert_bias.clone() for name, router in routers_of(model).items()}


def counted(model, inputs):
    """How many real tokens each expert gets, by plain loops over what routers choose."""
    chosen, loads = {}, {}
    handles = [
        router.register_forward_hook(lambda _, args, out, name=name: chosen.__setitem__(name, out[2]))
        for name, router in routers_of(model).items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    for name, index in chosen.items():
        is_text = "language_model" in name
        real = inputs["attention_mask"].reshape(-1).bool() if is_text else torch.ones(len(index)).bool()
        loads[name] = torch.zeros(4)
        for token in range(len(index)):
            for expert in index[token].tolist():
                loads[name][expert] += bool(real[token])
    return loads


def backward(model, inputs, **more):
    model(**inputs, labels=inputs["input_ids"], **more).loss.backward()


def stepped(loads, before, rate=RATE):
    return {name: before[name] + rate * (load.mean() - load).sign() for name, load in loads.items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, bias in found.items():
        torch.testing.assert_close(bias, wanted[name], atol=0, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_step_moves_biases_by_the_loads_of_all_its_passes(use_reentrant):
    """In a bare loop: two micro-batches, padding left out, layers that run again counted once."""
    model, step = sparse_model(**ALL_BIASED).train(), [batch((1, 2)), batch((2, 1), num_text=11)]
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wanted = biases(model)
    for _ in range(2):
        loads = [counted(model, inputs) for inputs in step]  # by the choices of this step
        wanted = stepped({name: sum(one[name] for one in loads) for name in wanted}, wanted)
        for inputs in step:
            backward(model, inputs)
        optimizer.step()
        optimizer.zero_grad()
        assert_same(biases(model), wanted)
    assert any(bias.abs().max() >= 2 * RATE for bias in wanted.values())


def test_only_passes_that_train_count():
    model, inputs = sparse_model(**ALL_BIASED).train(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model(**inputs)
    model.eval()
    model(**inputs)
    optimizer.step()
    assert not any(bias.any() for bias in biases(model).values())


def test_a_frozen_router_does_not_move():
    model, inputs = sparse_model(**ALL_BIASED).train(), batch()
    for name, router in routers_of(model).items():
        router.requires_grad_("connector" in name)
    backward(model, inputs)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
    for name, bias in biases(model).items():
        assert bias.any() == ("connector" in name), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_fp16s_scaler_skips_changes_nothing_and_loads_add_up(fused):
    model, inputs = sparse_model(**ALL_BIASED).train(), [batch((1, 2)), batch((2, 1), num_text=11)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loads = [counted(model, one) for one in inputs]
    for one, is_broken in zip(inputs, (True, False), strict=True):
        scaler.scale(model(**one, labels=one["input_ids"]).loss).backward()
        if is_broken:
            model.lm_head.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert any(bias.any() for bias in biases(model).values()) != is_broken
    start = {name: torch.zeros(4) for name in biases(model)}
    assert_same(biases(model), stepped({n: sum(one[n] for one in loads) for n in start}, start))


def test_models_and_copies_in_one_process_are_apart():
    first, inputs = sparse_model(**ALL_BIASED).train(), batch()
    backward(first, inputs)  # its loads are pending
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), sparse_model(seed=1, **ALL_BIASED).train()]
    for other in copies:
        other.zero_grad()
        wanted = stepped(counted(other, inputs), biases(other))
        backward(other, inputs)
        torch.optim.SGD(other.parameters(), lr=0.0).step()
        assert_same(biases(other), wanted)
        assert not any(bias.any() for bias in biases(first).values())
    wanted = stepped(counted(first, inputs), biases(first))
    torch.optim.SGD(first.parameters(), lr=0.0).step()
    assert_same(biases(first), wanted)


def test_two_optimizers_of_one_model_move_each_router_once():
    model, inputs = sparse_model(**ALL_BIASED).train(), batch()
    wanted = stepped(counted(model, inputs), biases(model))
    backward(model, inputs)
    groups = [[p for n, p in model.named_parameters() if ("router" in n) == is_router] for is_router in (False, True)]
    for parameters in groups:
        torch.optim.SGD(parameters, lr=0.0).step()
    assert_same(biases(model), wanted)


def test_an_engine_that_trains_flat_copies_is_understood():
    """As DeepSpeed does: gradients are taken off the weights, and the optimizer knows other tensors."""
    model, inputs = sparse_model(**ALL_BIASED).train(), batch()
    wanted = stepped(counted(model, inputs), biases(model))
    backward(model, inputs)
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.zeros_like(flat)
    model.zero_grad()
    torch.optim.SGD([flat], lr=0.0).step()
    assert_same(biases(model), wanted)


def test_the_copy_that_peft_trains_has_a_bias_of_its_own(tmp_path):
    model, inputs = sparse_model(**ALL_BIASED), batch()
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"])).train()
    backward(wrapped, inputs)
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.0).step()
    for name, bias in biases(wrapped).items():
        assert bias.any() == ("modules_to_save" in name), name
    saved = {name: value for name, value in get_peft_model_state_dict(wrapped).items() if "expert_bias" in name}
    assert len(saved) == 6
    assert all(value.any() for value in saved.values())
    wrapped.save_pretrained(tmp_path)
    assert_same(biases(PeftModel.from_pretrained(sparse_model(**ALL_BIASED), tmp_path)), biases(wrapped))


@pytest.mark.parametrize(
    "adapter", [{"modules_to_save": ["text_gate"]}, {"target_parameters": ["text_gate.readout"]}], ids=str
)
def test_an_adapter_on_the_text_gate_alone_leaves_the_bias(adapter):
    gated = BIASED | {"router_type": "attention"}
    model = sparse_model(**(ALL_BIASED | {"vision_moe": gated}))
    inputs = batch() | {"mm_token_type_ids": torch.where(batch()["input_ids"] == model.config.image_token_id, 1, 3)}
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **adapter)).train()
    backward(wrapped, inputs)
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1).step()
    assert not any(bias.any() for bias in biases(wrapped).values())


def test_the_bias_stays_in_float32(tmp_path):
    model = sparse_model(**ALL_BIASED)
    for router in routers_of(model).values():
        router.expert_bias.copy_(torch.tensor([0.001, 1.001, -2.003, 3.0]))
    wanted = biases(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one in (copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).half(), loaded):
        assert one.lm_head.weight.dtype != torch.float32
        assert all(bias.dtype == torch.float32 for bias in biases(one).values())
        assert_same(biases(one), wanted)


@pytest.mark.parametrize("router_type", ["softmax", "sigmoid"])
def test_a_bias_changes_the_choice_and_not_the_weights(router_type):
    moe = MoEConfig(**(BIASED | {"router_type": router_type, "num_experts_per_tok": 2}))
    router = Router(8, moe)
    router.reset_parameters()
    x = torch.randn(30, 8)
    logits, _, _ = router(x)
    score = logits.softmax(-1) if router_type == "softmax" else logits.sigmoid()
    router.expert_bias[3] = 5.0
    _, weight, index = router(x)
    assert (index == 3).any(1).all()
    chosen = score.gather(1, index)
    torch.testing.assert_close(weight, chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize(("kind", "pools"), [("isolated", [1, 3, 0]), ("intra_inter", [1, 2, 1])])
def test_closed_experts_stay_closed_and_pools_are_balanced_apart(kind, pools):
    fields = {"num_experts_per_tok": 1, "modality_routing": kind, "modality_experts": pools}
    router = Router(8, MoEConfig(**(BIASED | fields)))
    router.reset_parameters()
    is_image = torch.arange(24) % 3 == 0
    context = RouterContext(is_image=is_image[None])
    router.expert_bias.copy_(torch.tensor([-9.0, 9.0, 0.0, 0.0]))
    _, _, index = router(torch.randn(24, 8), context)
    is_open = torch.ones(24, 4).bool()
    is_open[is_image, pools[0] : pools[0] + pools[1]] = False
    is_open[~is_image, : pools[0]] = False
    assert is_open.gather(1, index).all()
    assert router.load.sum(1).tolist() == [8, 16]
    even = even_load(router.moe, router.load)
    wanted = torch.zeros(4)
    for flag in (True, False):  # what each would get by lot
        own = is_open[is_image == flag]
        wanted += (own / own.sum(1, keepdim=True)).sum(0)
    torch.testing.assert_close(even, wanted)


def test_loads_become_even():
    """Tokens that one expert would get most of are spread, by the bias alone."""
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=4, num_experts_per_tok=1, use_expert_bias=True, expert_bias_update_rate=0.01)
    router, x = Router(8, moe), torch.randn(400, 8)
    router.reset_parameters()
    x = x + 4 * router.weight[0].detach()
    first = torch.bincount(router(x)[2].flatten(), minlength=4)
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    for _ in range(150):
        router(x, RouterContext())
        optimizer.step()
    last = torch.bincount(router(x)[2].flatten(), minlength=4)
    assert first.max() > 200
    assert last.max() < 130


def trained(folder, max_steps, **resume):
    """Under the Trainer, without a line by the user."""
    torch.manual_seed(0)
    reads = models.processor()
    model = sparse_model(image_token_id=reads.image_token_id, **ALL_BIASED)
    fields = {"save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "seed": 1}
    fields |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    args = TrainingArguments(
        str(folder), max_steps=max_steps, learning_rate=1e-3, lr_scheduler_type="constant", **fields
    )
    trainer = Trainer(model, args, train_dataset=chat_rows(16), data_collator=ChatCollator(reads))
    trainer.train(**resume)
    return biases(model)


def test_a_trainers_checkpoint_resumes_the_bias(tmp_path):
    whole = trained(tmp_path / "whole", 4)
    first = trained(tmp_path / "parts", 2)
    assert any((whole[name] != first[name]).any() for name in whole)
    assert_same(trained(tmp_path / "parts", 4, resume_from_checkpoint=True), whole)
    for bias in whole.values():
        assert torch.equal(bias, (bias / RATE).round() * RATE)
        assert bias.abs().max() <= 4 * RATE


@pytest.mark.slow
def test_two_processes_have_the_biases_of_one(tmp_path):
    model = sparse_model(**ALL_BIASED)
    model.save_pretrained(tmp_path)
    said = run(Path(__file__).with_name("two_processes_bias.py"), tmp_path, "ddp", "fsdp")
    assert all(f"{mode} has the biases of one process" in said for mode in ("ddp", "fsdp"))


def test_routers_without_a_bias_are_not_watched():
    before = len(expert_bias._ROUTERS)
    model = sparse_model()
    assert len(expert_bias._ROUTERS) == before
    assert all(router.load is None and router.expert_bias is None for router in routers_of(model).values())
