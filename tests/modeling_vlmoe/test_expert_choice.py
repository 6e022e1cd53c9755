"""Experts that choose tokens: against plain loops, image by image, whatever else is in the batch."""

import math

import pytest
import torch

from modeling_vlmoe.expert_choice import capacity, choose_tokens
from modeling_vlmoe.image_inputs import IMAGE_KEYS
from modeling_vlmoe.part_images import PartImages
from modeling_vlmoe.parts import blocks_of
from modeling_vlmoe.router_losses import RouterContext
from tests import variable_images
from tests.models import EXPERTS, gap, pixels, sparse_model

CHOICE = EXPERTS | {"router_type": "expert_choice"}


def loop(logits, num_picked, counts, is_renormalized, is_real=None):
    """The weights of every token and expert, (T, E), by the definition."""
    score, start = logits.softmax(-1), 0
    weights = torch.zeros_like(score)
    for count in counts:
        tokens = [t for t in range(start, start + count) if is_real is None or is_real[t]]
        for expert in range(logits.shape[1]):
            number = min(math.ceil(num_picked * len(tokens) / logits.shape[1]), len(tokens))
            best = sorted(tokens, key=lambda t, expert=expert: -score[t, expert].item())[:number]
            for token in best:
                weights[token, expert] = score[token, expert]
        start += count
    if is_renormalized:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total.clamp(min=1e-30), weights)
    return weights


def as_table(choice, num_tokens, num_experts):
    weight, expert, token = choice
    table = torch.zeros(num_tokens, num_experts)
    return table.index_put((token, expert[:, 0]), weight[:, 0], accumulate=True)


@pytest.mark.parametrize("is_renormalized", [True, False])
@pytest.mark.parametrize("num_picked", [1, 2, 4])
@pytest.mark.parametrize("counts", [(6, 6), (9, 1, 5)])
def test_experts_choose_as_a_plain_loop(counts, num_picked, is_renormalized):
    logits = torch.randn(sum(counts), 4, requires_grad=True)
    images = PartImages(len(counts), None if len(set(counts)) == 1 else counts)
    table = as_table(choose_tokens(logits, num_picked, images, None, is_renormalized), *logits.shape)
    wanted = loop(logits, num_picked, counts, is_renormalized)
    torch.testing.assert_close(table, wanted)
    direction = torch.randn_like(table)
    gradients = [torch.autograd.grad((one * direction).sum(), logits)[0] for one in (table, wanted)]
    torch.testing.assert_close(*gradients)


def test_padding_is_not_chosen():
    logits, real = torch.randn(10, 4), torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 1]).bool()
    table = as_table(choose_tokens(logits, 2, PartImages(2), real), 10, 4)
    torch.testing.assert_close(table, loop(logits, 2, (5, 5), True, real))
    assert not table[~real].any()


def test_every_expert_gets_the_same_load():
    _, expert, _ = choose_tokens(torch.randn(18, 4) * 9, 2, PartImages(2))
    assert torch.bincount(expert[:, 0]).tolist() == [2 * capacity(9, 4, 2)] * 4


def test_saturated_scores_give_numbers():
    logits = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 300.0]], requires_grad=True)
    weight, _, _ = choose_tokens(logits, 3, PartImages(1))
    weight.square().sum().backward()
    assert weight.isfinite().all()
    assert logits.grad.isfinite().all()


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model, both = sparse_model(vision_moe=CHOICE, connector_moe=CHOICE), pixels(3)
    together = model.get_image_features(both).pooler_output
    for index, found in enumerate(together):
        alone = model.get_image_features(both[index : index + 1]).pooler_output[0]
        assert gap(found, alone) <= 1e-5


@pytest.mark.parametrize("family", variable_images.SPARSE_TOWERS)
@torch.no_grad()
def test_images_of_any_size_choose_apart(family):
    fields = dict.fromkeys(("vision_moe", "connector_moe"), CHOICE)
    model, reads = variable_images.sparse_model(family, **fields), variable_images.processor(family)

    def features(pictures):
        inputs = reads(images=pictures, text=reads.image_token * len(pictures), return_tensors="pt")
        given = {name: inputs[name] for name in ("pixel_values", *IMAGE_KEYS) if name in inputs}
        return model.get_image_features(**given).pooler_output

    images = variable_images.pictures(variable_images.SIZES[:4])
    together = features(images)
    assert len({len(one) for one in together}) > 1, "the images are to have unlike numbers of tokens"
    for picture, found in zip(images, together, strict=True):
        assert gap(found, features([picture])[0]) <= 1e-5


def test_tokens_without_an_expert_get_nothing():
    _, block = blocks_of(sparse_model(vision_moe=CHOICE | {"num_experts_per_tok": 1}), ["vision"])[0]
    x = torch.randn(1, 40, 24)
    context = RouterContext(learns=False, own_images=PartImages(1))
    token = block.router(x[0], context)[3]
    left_out = sorted(set(range(40)) - set(token.tolist()))
    assert left_out
    assert not block(x)[0, left_out].any()


def test_balance_is_not_computed_and_z_is():
    model = sparse_model(vision_moe=CHOICE, connector_moe=CHOICE).train()
    losses = model(input_ids=torch.full((1, 9), 300), pixel_values=pixels(1)).router_losses
    for part in ("vision", "connector"):
        assert not losses[part][:, 0].any()
        assert (losses[part][:, 1] > 0).all()


def test_raises_when_it_is_not_known_whose_tokens_they_are():
    _, block = blocks_of(sparse_model(vision_moe=CHOICE), ["vision"])[0]
    with pytest.raises(ValueError, match="not known which image each is of"):
        block(torch.randn(9, 24))
