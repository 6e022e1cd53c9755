"""The losses against plain loops, and that they reach the router whatever a trainer does with the returned loss."""

import pytest
import torch

from modeling_vlmoe.router_losses import balance_loss, z_loss
from tests.conformance.oracle import loop_balance, loop_z
from tests.models import batch, sparse_model


def routed(num_tokens=11):
    logits = torch.randn(num_tokens, 4) * 2
    mask = torch.ones(num_tokens)
    mask[:3] = 0
    return logits, logits.topk(2).indices, mask


def test_losses_equal_a_plain_loop():
    logits, index, mask = routed()
    torch.testing.assert_close(balance_loss(logits.softmax(-1), index, mask), loop_balance(logits, index, mask))
    torch.testing.assert_close(z_loss(logits, mask), loop_z(logits, mask))


def test_balance_is_one_when_routing_is_uniform():
    index = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    assert balance_loss(torch.full((4, 4), 0.25), index, torch.ones(4)) == pytest.approx(1.0)


def test_balance_sees_each_layers_collapse():
    """Four layers, each collapsed onto a pair of its own, score as collapsed.

    Pooled over layers they would score 1.
    """
    probability = torch.zeros(8, 8)
    probability[:, :2] = 0.5
    assert balance_loss(probability, torch.tensor([[0, 1]] * 8), torch.ones(8)) == pytest.approx(4.0)


def test_all_padding_is_no_division_by_zero():
    logits, index, mask = routed()
    assert balance_loss(logits.softmax(-1), index, mask * 0) == 0
    assert z_loss(logits, mask * 0) == 0


def routers(model):
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("router.weight")}


def part_of(name):
    return "vision" if "vision_tower" in name else "connector" if "connector" in name else "text"


def recorded_inputs(model, inputs):
    """What each router read, by a hook; in the order of the routers' names."""
    seen, handles = {}, []
    for name in routers(model):
        router = model.get_submodule(name.removesuffix(".weight"))
        hook = router.register_forward_hook(lambda _, args, __, name=name: seen.__setitem__(name, args[0].detach()))
        handles.append(hook)
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def oracle_gradients(model, inputs, scale=1.0):
    """The attached losses' gradient on each router, by plain loops over what the routers read, their inputs held
    fixed.
    """
    found = {}
    seen = recorded_inputs(model, inputs)
    counts = {part: sum(part_of(name) == part for name in seen) for part in ("text", "vision", "connector")}
    for name, x in seen.items():
        moe = model.config.moe(part_of(name))
        weight = model.get_parameter(name).detach().clone().requires_grad_()
        logits = x @ weight.T
        index = logits.softmax(-1).topk(moe.num_experts_per_tok).indices
        mask = inputs["attention_mask"].reshape(-1) if part_of(name) == "text" else torch.ones(len(x))
        loss = moe.router_aux_loss_coef * loop_balance(logits, index, mask) + moe.router_z_loss_coef * loop_z(
            logits, mask
        )
        (scale * loss / counts[part_of(name)]).backward()
        found[name] = weight.grad
    return found


def last_layers_gradient(model, name, run):
    """Gradient with the losses on, less that with them off.

    The attached part (exact where nothing sparse comes after).
    """
    gradients = []
    for coefficient in (None, 0.0):
        model.zero_grad()
        saved = {}
        for part in ("text", "vision", "connector"):
            moe = model.config.moe(part)
            saved[part] = (moe.router_aux_loss_coef, moe.router_z_loss_coef)
            if coefficient is not None:
                moe.router_aux_loss_coef = moe.router_z_loss_coef = coefficient
        run()
        gradients.append(model.get_parameter(name).grad.clone())
        for part, (aux, z) in saved.items():
            model.config.moe(part).router_aux_loss_coef, model.config.moe(part).router_z_loss_coef = aux, z
    return gradients[0] - gradients[1]


LAST = "model.language_model.layers.2.mlp.router.weight"


@pytest.fixture
def training():
    model = sparse_model().train()
    for part in ("text", "vision", "connector"):
        model.config.moe(part).router_aux_loss_coef, model.config.moe(part).router_z_loss_coef = 0.7, 0.3
    return model, batch((1, 2))


def test_the_attached_gradient_is_the_losses(training):
    model, inputs = training
    wanted = oracle_gradients(model, inputs)[LAST]
    found = last_layers_gradient(model, LAST, lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_losses_reach_the_router_when_a_trainer_makes_its_own_loss(training):
    """TRL calls the base model and builds the loss from its outputs."""
    model, inputs = training
    wanted = oracle_gradients(model, inputs)[LAST]
    found = last_layers_gradient(
        model, LAST, lambda: model.model(**inputs).last_hidden_state.square().mean().backward()
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_losses_survive_checkpointing(training, use_reentrant):
    model, inputs = training
    wanted = oracle_gradients(model, inputs)[LAST]
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = last_layers_gradient(model, LAST, lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.25, 1024.0], ids=["accumulation", "grad_scaler"])
def test_the_losses_scale_as_the_trainer_scales_the_loss(training, factor):
    model, inputs = training
    wanted = oracle_gradients(model, inputs, scale=factor)[LAST]
    found = last_layers_gradient(
        model, LAST, lambda: (model(**inputs, labels=inputs["input_ids"]).loss * factor).backward()
    )
    torch.testing.assert_close(found, wanted, atol=1e-5 * max(factor, 1), rtol=1e-4)


def test_micro_batches_weigh_by_their_share_of_the_step(training):
    model, inputs = training
    labels = inputs["input_ids"]
    wanted = oracle_gradients(model, inputs, scale=0.5)[LAST]
    found = last_layers_gradient(
        model,
        LAST,
        lambda: model(**inputs, labels=labels, num_items_in_batch=2 * labels[:, 1:].numel()).loss.backward(),
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_every_router_gets_a_gradient_from_copies_too():
    """Among copies the task's own gradient on the router is zero (MATHS 1): what is left is the losses'."""
    model, inputs = sparse_model().train(), batch((1, 2))
    for _, block in model.model.named_modules():
        if hasattr(block, "experts") and hasattr(block, "router"):
            for parameter in block.experts.parameters(recurse=False):
                parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    wanted = oracle_gradients(model, inputs)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name in (LAST, "model.connector.mlp.router.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, wanted[name], atol=1e-5, rtol=1e-3)


def test_reported_losses_are_per_layer_and_weighted_in_aux_loss(training):
    model, inputs = training
    out = model(**inputs, labels=inputs["input_ids"])
    assert {part: tuple(losses.shape) for part, losses in out.router_losses.items()} == {
        "text": (3, 2),
        "vision": (2, 2),
        "connector": (1, 2),
    }
    assert not out.aux_loss.requires_grad
    weights = torch.tensor([0.7, 0.3])
    torch.testing.assert_close(
        out.aux_loss, sum((losses.mean(0) * weights).sum() for losses in out.router_losses.values())
    )


def test_coefficients_are_read_live_from_text_config(training):
    model, inputs = training
    before = model(**inputs, labels=inputs["input_ids"])
    model.config.text_config.router_aux_loss_coef = 0.0  # as TRL writes it
    after = model(**inputs, labels=inputs["input_ids"])
    text = before.router_losses["text"][:, 0].mean()
    torch.testing.assert_close(before.aux_loss - after.aux_loss, 0.7 * text)


def test_nothing_is_computed_when_not_training(training):
    model, inputs = training
    assert model.eval()(**inputs).router_losses is None
    with torch.no_grad():
        assert model.train()(**inputs).aux_loss is None


def test_reported_router_logits_carry_no_gradient(training):
    """A trainer's own auxiliary term, built from them, adds nothing to the router's gradient."""
    model, inputs = training
    out = model(**inputs, output_router_logits=True)
    assert all(
        not logits.requires_grad
        for logits in (*out.router_logits, *out.vision_router_logits, *out.connector_router_logits)
    )


def test_a_frozen_routers_losses_are_reported_but_move_nothing(training):
    model, inputs = training
    for parameter in routers(model).values():
        parameter.requires_grad_(False)
    down = "model.language_model.layers.1.mlp.experts.down_proj"
    attached = last_layers_gradient(model, down, lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward())
    assert attached.abs().max() == 0
    assert model(**inputs).router_losses["text"].shape == (3, 2)
