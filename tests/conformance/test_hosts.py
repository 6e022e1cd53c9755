"""The router losses of hosts that are sparse in place reach their routers, whole and once, under Trainer and TRL.

Qwen2.5-VL says that its loss is a mean over each micro-batch (`accepts_loss_kwargs`), SmolVLM counts the step's
targets.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForImageTextToText, is_torchvision_available

from modeling_vlmoe import routed_pass
from modeling_vlmoe.finetune import loss_follower
from tests import hosts
from tests.modeling_vlmoe.test_in_place import model
from tests.slow import often

from .broken import nothing_followed
from .run import SETTINGS, measure
from .spread import SPREADS, measure_spread
from .table import SMALLEST_MISTAKE
from .test_conformance import holds

pytestmark = pytest.mark.filterwarnings("ignore")  # trainers' own
FAMILIES = ["qwen2_5_vl", "smolvlm"]
TRAINERS = ["Trainer", "TRL SFT"]


def processor(family):
    """SmolVLM's chats ask its video processor, which needs torchvision; Idefics3's has the same tokens and tiles."""
    return hosts.processor("idefics3" if family == "smolvlm" and not is_torchvision_available() else family)


@pytest.fixture(scope="module", params=often(FAMILIES, "qwen2_5_vl"))
def host(request, tmp_path_factory):
    """The folder of a model with unlike experts, and of its processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model(request.param).save_pretrained(folder)
    processor(request.param).save_pretrained(folder)
    return request.param, str(folder)


def loader(folder):
    return partial(AutoModelForImageTextToText.from_pretrained, folder)


@pytest.mark.parametrize("setting", ["accumulation", pytest.param("LoRA on experts", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_gradient_is_the_oracles(host, name, setting):
    family, folder = host
    holds(measure(name, SETTINGS[setting], "both", make=loader(folder), reads=processor(family)))


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
def test_two_processes(host, spread):
    cells = measure_spread(spread, "--host", *TRAINERS, folder=host[1])
    assert set(cells) == set(TRAINERS)
    for cell in cells.values():
        holds(cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_a_mistake_is_found(host, name):
    """Router losses that are not divided among the micro-batches of a step as the task's loss is."""
    family, folder = host
    with nothing_followed(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(loss_follower, "micro_batch_share", lambda *_: 1.0)
        patched.setattr(routed_pass, "micro_batch_share", lambda *_: torch.ones(()))
        cell = measure(name, SETTINGS["accumulation"], "both", make=loader(folder), reads=processor(family))
    assert cell.gap > SMALLEST_MISTAKE
