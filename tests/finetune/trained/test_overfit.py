"""Eight samples are learnt by heart with every method and preset, and what is frozen stays as it was, bit by bit.

The pictures are noise and the answers one token each, so that a random LLM that is frozen can be made to say them; its
head is five times as large as drawn: a smaller one keeps a frozen model's loss above 0.7, whatever is before it.
"""

import pytest
import torch
from PIL import Image

from modeling_vlmoe.finetune import build_trainer
from modeling_vlmoe.finetune.trained.names import PRESETS
from tests import hosts, models
from tests.finetune.conftest import DENSE
from tests.finetune.questions import question
from tests.slow import often

NEAR_ZERO = 0.05  # per token of the answers
SIDE = 24
DELTA = {part: models.EXPERTS | {"expert_type": "delta", "expert_rank": 4} for part in DENSE}
# Settings of a run, fields of the model.
WAYS = {
    "align": ({"method": "align", "max_steps": 150}, {}),
    "align, dense": ({"method": "align", "max_steps": 200}, DENSE),
    "lora": ({"method": "lora", "max_steps": 60}, {}),
    "lora, with connector": ({"method": "lora", "train": ["connector"], "max_steps": 60}, {}),
    "lora on attention, experts whole": (
        {"method": "lora", "train": ["experts"], "lora_targets": ["attention"], "max_steps": 60},
        {},
    ),
    "lora, dense": ({"method": "lora", "max_steps": 80}, DENSE),
    "lora, 4 bits": ({"method": "lora", "max_steps": 80}, {}),
    "delta": ({"method": "delta", "max_steps": 40}, DELTA),
    "full, dense": ({"method": "full", "max_steps": 40}, DENSE),
    "full, rates": (
        {"method": "full", "learning_rates": {"routers": 2e-2, "vision": 1e-3}, "warmups": {"vision": 5}}
        | {"max_steps": 40},
        {},
    ),
    "vision": ({"method": "full", "train": ["vision"], "max_steps": 250}, {}),
    "connector": ({"method": "full", "train": ["connector"], "max_steps": 150}, {}),
    "last layers": ({"method": "full", "train": ["model.language_model.layers.[12].*"], "max_steps": 60}, {}),
    **{preset: ({"method": "full", "train": [preset], "max_steps": 40}, {}) for preset in PRESETS},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Eight pictures of noise, and a letter to say of each."""
    folder, found = tmp_path_factory.mktemp("noise"), []
    for index, letter in enumerate("abcdefgh"):
        path = folder / f"{letter}.png"
        hosts.picture(index, (SIDE, SIDE)).save(path)
        assert Image.open(path).size == (SIDE, SIDE)
        row = question([str(path)], letter, "what?")
        found.append(row | {"images": [{"bytes": None, "path": str(path)}]})
    return found


@pytest.mark.parametrize("way", often(WAYS, "moe-layers", "delta"))
def test_eight_samples_are_learnt_and_frozen_parts_stay(way, rows, arguments):
    given, fields = WAYS[way]
    processor = models.processor()
    model = models.sparse_model(image_token_id=processor.image_token_id, **fields)
    with torch.no_grad():
        model.lm_head.weight *= 5
    if way == "lora, 4 bits":
        from modeling_vlmoe.quantization import quantize_experts

        quantize_experts(model, 4)
    quiet = {"save_strategy": "no", "logging_steps": 1000, "log_router_load": False, "watch_steps": 0}
    args = arguments(**quiet, **given, per_device_train_batch_size=8, lr_scheduler_type="cosine")
    trainer = build_trainer(model, processor, rows, args, rows)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trained = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < NEAR_ZERO
    after = trainer.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed <= trained, sorted(changed - trained)
    assert changed
