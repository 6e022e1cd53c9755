"""A run of transformers' Trainer from its first step to a model that others load."""

import math

import pytest
import torch
import trl
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.finetune import FinetuneArguments, build_trainer, follow_trainer, lora_config
from tests import models
from tests.routers import RouterRow
from tests.trainers import chats, runs

CHECKPOINTS = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # trl's own default


# Resuming


@pytest.mark.parametrize("method", runs.METHODS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(method, base, tmp_path):
    """Losses and weights, across the end of an epoch, with router losses."""
    whole = runs.build_trainer(base, runs.build_model(base, method), tmp_path)
    whole.train()
    resumed = runs.build_trainer(base, runs.build_model(base, method), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert runs.losses(resumed) == runs.losses(whole)
    assert len(runs.losses(resumed)) == 5
    for name, value in runs.weights(whole).items():
        torch.testing.assert_close(runs.weights(resumed)[name], value, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("method", runs.METHODS)
def test_a_resumed_run_goes_on_with_the_experts_biases(method, base, tmp_path):
    """Those that checkpoints hold, moved by each step."""
    processor = AutoProcessor.from_pretrained(base)
    fields = RouterRow({"use_expert_bias": True}).parts_fields()
    biased = models.sparse_model(image_token_id=processor.image_token_id, **fields)
    biased.save_pretrained(tmp_path / "biased")
    processor.save_pretrained(tmp_path / "biased")
    found = []
    for checkpoint in (None, str(tmp_path / "out/checkpoint-3")):
        model = runs.build_model(tmp_path / "biased", method)
        trainer = runs.build_trainer(base, model, tmp_path / "out")
        before = {name: value for name, value in runs.weights(trainer).items() if "expert_bias" in name}
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(runs.weights(trainer))
    whole, resumed = found
    trained = [name for name in before if "original_module" not in name]  # of PEFT's copies the one that learns
    assert trained
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=0, rtol=0, msg=name)
    assert any(not torch.equal(whole[name], before[name]) for name in trained)


# Evaluation


def test_evaluation_gets_plain_logits_and_leaves_training_as_it_was(base, tmp_path):
    """Router logits are on; the run with evaluation equals the one without."""
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"seen": 1.0}

    found = []
    for fields in ({}, {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}):
        model = runs.build_model(base)
        model.config.text_config.output_router_logits = True
        settings = {"max_steps": 2, "save_strategy": "no"} | fields
        trainer = runs.build_trainer(base, model, tmp_path, compute_metrics=compute_metrics, **settings)
        trainer.train()
        found.append(trainer)
    evaluations = [entry for entry in found[1].state.log_history if "eval_loss" in entry]
    assert len(evaluations) == len(seen) == 2
    assert all(entry["eval_seen"] == 1.0 and math.isfinite(entry["eval_loss"]) for entry in evaluations)
    vocabulary = found[1].model.config.text_config.vocab_size
    assert all(logits == (*labels, vocabulary) for logits, labels in seen)
    assert runs.losses(found[0]) == runs.losses(found[1])


@pytest.mark.parametrize("method", runs.METHODS)
def test_the_best_model_is_loaded_at_the_end(method, base, tmp_path):
    """The second of three evaluations is the best: the run ends with its weights."""
    scores = iter([1.0, 3.0, 2.0])
    trainer = runs.build_trainer(
        base,
        runs.build_model(base, method),
        tmp_path,
        compute_metrics=lambda _: {"score": next(scores)},
        max_steps=3,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    batch = trainer.data_collator(chats.chat_rows())
    for step, is_best in ((2, True), (3, False)):
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path / f"checkpoint-{step}")
        with torch.no_grad():
            logits = [model.eval()(**batch).logits for model in (trainer.model, saved)]
        assert torch.equal(*logits) == is_best


# What is trained

STAGES = {
    "connector": ("model.connector.",),
    "routers and connector": (".router.", "model.connector."),
    "experts": (".experts.",),
    "all": ("",),
}
# The ViT's weights behind the layer that the connector reads.
IDLE = ("vision_tower.encoder.layers.3.", "vision_tower.post_layernorm.", "vision_tower.head.")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_exactly_what_it_leaves_unfrozen(stage, base, tmp_path):
    model = runs.build_model(base)
    listed = {name for name, _ in model.named_parameters() if any(part in name for part in STAGES[stage])}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in listed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [
        (colours, said) for colours, said in chats.ROWS if colours
    ]  # text alone gives a connector nothing to learn
    runs.build_trainer(base, model, tmp_path, rows, max_steps=2, save_strategy="no").train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in listed if not any(part in name for part in IDLE)}
    assert changed


# What is left behind

LOAD = """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in {folders!r}:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(processor).__name__ == "VLMoEProcessor"
    assert "generation" in processor.chat_template
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        found = model(**expected["inputs"]).logits
    assert torch.equal(found, expected["logits"]), folder
    chat = [{{"role": "user", "content": [{{"type": "text", "text": "hi"}}]}}]
    prompt = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2).shape[0] == 1
    print(folder)
"""


def ours(method, base, folder):
    """A run of our recipes."""
    args = FinetuneArguments(
        output_dir=str(folder), method=method, model=str(base), max_steps=1, report_to="none", use_cpu=True
    )
    processor = AutoProcessor.from_pretrained(base)
    return build_trainer(AutoModelForImageTextToText.from_pretrained(base), processor, chats.chat_rows(), args)


def sft(base, folder, **kwargs):
    """A run of TRL's."""
    fields = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None, "max_steps": 1}
    args = trl.SFTConfig(folder, **fields)
    trainer = trl.SFTTrainer(str(base), args=args, train_dataset=chats.messages(), **kwargs)
    follow_trainer(trainer)
    return trainer


@CHECKPOINTS
def test_every_trainers_checkpoint_loads_anywhere(base, tmp_path, run_without_package):
    """Full models and adapters, in a process that has nothing but the folder (and the adapter's base)."""
    peft_config = lora_config(runs.build_model(base), lora_r=2)
    trainers = {
        "plain": runs.build_trainer(base, runs.build_model(base), tmp_path / "plain", max_steps=1),
        "plain lora": runs.build_trainer(base, runs.build_model(base, "lora"), tmp_path / "plain lora", max_steps=1),
        "trl": sft(base, tmp_path / "trl"),
        "trl lora": sft(base, tmp_path / "trl lora", peft_config=peft_config),
        "align": ours("align", base, tmp_path / "align"),
        "lora": ours("lora", base, tmp_path / "lora"),
    }
    inputs = trainers["plain"].data_collator(chats.chat_rows())
    inputs.pop("labels")
    folders = []
    for name, trainer in trainers.items():
        trainer.train()
        folder = tmp_path / name / "checkpoint-1"
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert isinstance(model, VLMoEForConditionalGeneration)
        with torch.no_grad():
            logits = model(**inputs).logits
            torch.testing.assert_close(trainer.model.eval()(**inputs).logits, logits, atol=0, rtol=0)
        torch.save({"inputs": inputs, "logits": logits}, folder / "expected.pt")
        folders.append(str(folder))
    assert run_without_package(LOAD.format(folders=folders)).split("\n")[:-1] == folders
