"""Assisted decoding with images: a smaller vision-language model, a text model or the prompt itself proposes tokens;
what comes out is what the model generates alone.

transformers 5.23 gives an assistant no images (`_assisted_decoding` is never its first pass): with images its
proposals are guesses, seldom taken.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.models import batch, sparse_model

KEPT = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_deprecated_use():
    """In the place of the one for all tests: the host's assisted decoding itself uses what it deprecates (5.23)."""


def itself(model):
    """The best assistant there is: every proposal is taken."""
    return copy.deepcopy(model)


def smaller(model):
    return sparse_model(seed=3)


def dense(model):
    return sparse_model(seed=4, text_moe=None, vision_moe=None, connector_moe=None)


def text_alone(model):
    """It sees image tokens as any other token, and no pixels."""
    return AutoModelForCausalLM.from_config(tiny.text_config("llama", num_hidden_layers=1)).eval()


@pytest.fixture(scope="module")
def model():
    model = sparse_model()
    model.generation_config.eos_token_id = None  # up to the limit
    return model


@pytest.mark.parametrize("counts", [(1,), (2,), (0,)], ids=["image", "two images", "text"])
@pytest.mark.parametrize("assistant", [itself, smaller, dense, text_alone], ids=lambda made: made.__name__)
def test_an_assistant_changes_no_token(model, assistant, counts):
    inputs = batch(counts)
    alone = model.generate(**inputs, **KEPT)
    made = assistant(model)
    made.generation_config.assistant_confidence_threshold = 0  # it proposes whatever it thinks of it
    passes = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    assisted = model.generate(**inputs, **KEPT, assistant_model=made)
    hook.remove()
    assert torch.equal(assisted, alone)
    assert len(alone[0]) == inputs["input_ids"].shape[1] + KEPT["max_new_tokens"]
    if assistant is itself and counts == (0,):
        assert len(passes) < KEPT["max_new_tokens"] / 2


@pytest.mark.parametrize("counts", [(1,), (2,), (0,)], ids=["image", "two images", "text"])
def test_prompt_lookup_changes_no_token(model, counts):
    inputs = batch(counts)
    assert torch.equal(model.generate(**inputs, **KEPT, prompt_lookup_num_tokens=3), model.generate(**inputs, **KEPT))
