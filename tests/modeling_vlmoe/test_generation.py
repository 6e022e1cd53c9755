"""Generation with images: a batch equals its singles, in every mode that the host has."""

import pytest
import torch

from tests.models import batch, single, sparse_model

COUNTS = (1, 2, 0)
KEPT = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return sparse_model()


def new_tokens(model, inputs, **kwargs):
    return model.generate(**inputs, **(KEPT | kwargs))[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=["greedy", "static_cache", "no_cache", "beams", "several_returns"],
)
def test_a_batch_generates_what_its_singles_generate(model, kwargs):
    inputs = batch(COUNTS)
    together = new_tokens(model, inputs, **kwargs)
    alone = torch.cat([new_tokens(model, single(inputs, COUNTS, row), **kwargs) for row in range(len(COUNTS))])
    assert torch.equal(together, alone)


def test_static_and_dynamic_cache_agree(model):
    inputs = batch(COUNTS)
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, inputs, cache_implementation="static"))


def test_the_cache_agrees_with_whole_forward_passes(model):
    inputs = batch((2,))
    ids = inputs["input_ids"]
    for _ in range(4):
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids[:, -4:], new_tokens(model, inputs, max_new_tokens=4, min_new_tokens=4))


def test_sampling_repeats_with_its_seed(model):
    inputs = batch(COUNTS)
    kwargs = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    first = new_tokens(model, inputs, **kwargs)
    torch.manual_seed(5)
    assert torch.equal(first, new_tokens(model, inputs, **kwargs))
    assert first.shape == (9, 6)


def test_images_matter(model):
    inputs = batch((1, 1))
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.equal(new_tokens(model, inputs), new_tokens(model, swapped))


def test_the_processors_own_keys_are_accepted(model):
    inputs = batch((1, 1))
    marked = inputs | {"mm_token_type_ids": (inputs["input_ids"] == model.config.image_token_id).long()}
    assert torch.equal(new_tokens(model, inputs), new_tokens(model, marked))
