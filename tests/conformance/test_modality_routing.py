"""The router losses of an LLM that is routed by modality reach its routers, whole and once, under Trainer and TRL."""

from functools import partial

import pytest

from modeling_vlmoe import VLMoEForConditionalGeneration, router_losses
from tests import models
from tests.modeling_vlmoe.test_modality_routing import KINDS

from .run import SETTINGS, measure
from .spread import SPREADS, measure_spread
from .table import SMALLEST_MISTAKE
from .test_conformance import holds
from .trainers import processor

pytestmark = pytest.mark.filterwarnings("ignore")  # trainers' own
TRAINERS = ["Trainer", "TRL SFT"]
QUICK = [("per_modality_balance", "Trainer"), ("intra_inter", "TRL SFT")]
CELLS = [
    pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for name in TRAINERS
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a tiny model of a kind."""

    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        token = processor().image_token_id
        models.sparse_model(text_moe=KINDS[kind], image_token_id=token).save_pretrained(folder)
        return str(folder)

    return save


def cell(folder, name, setting="accumulation"):
    make = partial(VLMoEForConditionalGeneration.from_pretrained, folder)
    return measure(name, SETTINGS[setting], "both", make=make)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_the_gradient_is_the_oracles(kind, name, folder_of):
    holds(cell(folder_of(kind), name))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["checkpointing", "checkpointing, reentrant", "LoRA on experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_oracles_in_every_setting(kind, setting, folder_of):
    holds(cell(folder_of(kind), "TRL SFT", setting))


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind, spread, folder_of):
    cells = measure_spread(spread, *TRAINERS, folder=folder_of(kind))
    assert set(cells) == set(TRAINERS)
    for found in cells.values():
        holds(found)


@pytest.mark.slow
def test_a_mistake_is_found(folder_of, monkeypatch):
    """One balance over all tokens, where each modality has its own."""

    def pooled(moe, probability_TE, expert_TK, mask_T, is_image_T):
        return router_losses.balance_loss(probability_TE, expert_TK, mask_T)

    monkeypatch.setattr(router_losses, "balance_by_modality", pooled)
    assert cell(folder_of("per_modality_balance"), "Trainer").gap > SMALLEST_MISTAKE
