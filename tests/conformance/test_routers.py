"""Every router under trainers: its losses reach it, whole and once, as a plain-loop oracle has them."""

import functools
import tempfile

import pytest
import torch

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.routers import Router
from tests import models
from tests.routers import ROUTERS

from .run import ACCUMULATED, SETTINGS, Setting, measure
from .table import LIMIT
from .trainers import KINDS, processor

pytestmark = pytest.mark.filterwarnings("ignore")  # trainers' own
# A bias moves with each step, and the oracle looks at the model behind the last: it is to move by nothing.
STILL = {"expert_bias_update_rate": 1e-12}
# With the other router of each kind in the slow run.
OFTEN = ("sigmoid, expert bias", "logit norm", "raw", "expert choice")
FEW = ("Trainer", "TRL SFT")
CELLS = [
    pytest.param(name, router, setting, marks=() if is_often else pytest.mark.slow)
    for router, row in ROUTERS.items()
    for name in KINDS
    for setting in SETTINGS
    if row.inputs is None and router != "softmax"
    for is_often in [name == "Trainer" and router in OFTEN and setting == "accumulation"]
    if is_often or name in FEW or setting == "accumulation"
]


@functools.cache
def folder_of(router: str) -> tempfile.TemporaryDirectory:
    """A tiny model with this router wherever it is allowed, its biases drawn."""
    fields = ROUTERS[router].parts_fields(**(STILL if "bias" in router else {}))
    model = models.sparse_model(image_token_id=processor().image_token_id, **fields)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, Router) and module.expert_bias is not None:
            module.expert_bias.normal_(std=0.3, generator=generator)
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder


@pytest.mark.parametrize(("name", "router", "setting"), CELLS)
def test_the_gradient_of_a_router_is_the_oracles(name, router, setting):
    how = SETTINGS[setting] if setting != "accumulation" else Setting(ACCUMULATED)
    make = lambda: VLMoEForConditionalGeneration.from_pretrained(folder_of(router).name)  # noqa: E731
    cell = measure(name, how, "both", make)
    assert cell.task > 0.01
    assert cell.auxiliary > 0.1
    assert cell.gap <= LIMIT
