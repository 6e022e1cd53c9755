"""Router losses reach the text gates of ViT and connector, whole and once, as they reach plain routers."""

from functools import partial

import pytest
from transformers import AutoModelForImageTextToText

from tests import models
from tests.modeling_vlmoe.text_gates import GATE

from .run import SETTINGS, measure
from .test_conformance import holds
from .trainers import KINDS

pytestmark = pytest.mark.filterwarnings("ignore")  # trainers' own
# One in the default run; every setting under every trainer in the slow one.
QUICK = {"TRL SFT": "checkpointing, reentrant"}
CELLS = [
    pytest.param(name, setting, marks=() if QUICK.get(name) == setting else pytest.mark.slow)
    for name in KINDS
    for setting in SETTINGS
]


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A loader of a model with unlike experts and gates that matter, and its processor."""
    folder, processor = tmp_path_factory.mktemp("gated"), models.processor()
    processor.marks_visible_text = True
    parts = {"vision_moe": GATE, "connector_moe": GATE, "image_token_id": processor.image_token_id}
    models.sparse_model(**parts).save_pretrained(folder)
    return partial(AutoModelForImageTextToText.from_pretrained, folder), processor


@pytest.mark.parametrize(("name", "setting"), CELLS)
def test_the_gradient_is_the_oracles(gated, name, setting):
    make, processor = gated
    holds(measure(name, SETTINGS[setting], "both", make=make, reads=processor))
