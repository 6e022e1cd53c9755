"""TRL's trainers carry the marks of the text that images may see, and train the gates that read it."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import models
from tests.modeling_vlmoe.text_gates import GATE
from tests.trainers.test_trl import LORA, build, pytestmark  # noqa: F401 (the marks of this file too)

SLOW = pytest.mark.slow
QUESTION = "which colour?"
SAID = ("red", "nothing", "two", "green", "blue", "no", "assistant")


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A model whose image parts route by the text, with a gate that matters."""
    folder, processor = tmp_path_factory.mktemp("gated"), models.processor()
    processor.marks_visible_text = True
    parts = {"vision_moe": GATE, "connector_moe": GATE, "image_token_id": processor.image_token_id}
    models.sparse_model(**parts).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def marked_texts(trainer, processor):
    """Notes, of each pass, what of its rows is marked."""
    found = []

    def note(body, args, kwargs):
        marks = kwargs["mm_token_type_ids"]
        found.extend(processor.decode(ids[mark == 3]) for ids, mark in zip(kwargs["input_ids"], marks, strict=True))

    body = trainer.accelerator.unwrap_model(trainer.model)
    body = getattr(body, "base_model", body)
    for module in body.modules():
        if type(module).__name__ == "VLMoEModel":
            module.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize(
    "case",
    [
        "sft messages",
        "dpo",
        *(pytest.param(f"sft {rows}", marks=SLOW) for rows in ("prompt and completion", "one image")),
    ],
)
def test_the_gate_learns_from_questions_and_sees_no_answer(case, gated, tmp_path):
    processor = AutoProcessor.from_pretrained(gated)
    trainer = build(case, AutoModelForImageTextToText.from_pretrained(gated), tmp_path, processing_class=processor)
    texts = marked_texts(trainer, processor)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if "text_gate" in name}
    trainer.train()
    assert texts
    for text in texts:
        assert QUESTION in text
        assert not any(said in text.replace(QUESTION, "") for said in SAID)
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(one, after[name]) for name, one in before.items())


def test_the_gate_learns_beside_an_adapter(gated, tmp_path):
    trainer = build("sft messages", str(gated), tmp_path, peft_config=LoraConfig(**LORA))
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer.train()
    gates = [name for name in before if "text_gate" in name]
    assert gates
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in gates)


@SLOW
def test_grpo_generates_and_learns_with_it(gated, tmp_path):
    trainer = build("grpo", str(gated), tmp_path, {"max_steps": 1})
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if "text_gate" in name}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(one, after[name]) for name, one in before.items())
