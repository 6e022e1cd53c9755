"""Delta experts under PEFT and Trainer: what can be trained of them, saved, loaded and merged."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from modeling_vlmoe.delta_experts import delta_experts
from modeling_vlmoe.finetune import lora_config, prepare_model
from tests.finetune.conftest import save_model
from tests.finetune.test_adapters import ATTENTION, LAYERS, ROUTERS, TEXT, attention, trained
from tests.models import batch

DELTA = {"num_experts": 4, "num_experts_per_tok": 2, "expert_type": "delta", "expert_rank": 3}
DELTAS = {
    f"{TEXT}.{layer}.mlp.experts.deltas.{stack}_proj_{pair}"
    for layer in LAYERS
    for stack in ("gate_up", "down")
    for pair in "ab"
}


@pytest.fixture(scope="module")
def delta_base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("delta"), text_moe=DELTA, vision_moe=DELTA, connector_moe=DELTA)


@pytest.fixture
def delta(delta_base):
    return AutoModelForImageTextToText.from_pretrained(delta_base)


@pytest.fixture
def inputs(delta):
    made = batch((1, 2))
    made["input_ids"] = made["input_ids"].masked_fill(made["input_ids"] == 300, delta.config.image_token_id)
    return made


def test_an_adapter_trains_the_pairs_whole(delta, arguments):
    wanted = attention(TEXT, LAYERS, ATTENTION["llama"]) | ROUTERS | DELTAS
    assert trained(prepare_model(delta, arguments(lora_dropout=0.1))) == wanted


def test_raises_when_the_pairs_alone_are_to_be_an_adapter(delta):
    with pytest.raises(ValueError, match="PEFT wants a target beside them: add attention"):
        lora_config(delta, lora_targets=["experts"])


def test_an_adapter_comes_back_and_merges(delta, delta_base, inputs, tmp_path):
    tuned = get_peft_model(delta, lora_config(delta, lora_parts=["text", "vision"], train_connector=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
        wanted = tuned.eval()(**inputs).logits
        plain = AutoModelForImageTextToText.from_pretrained(delta_base)
        assert (wanted - plain(**inputs).logits).abs().max() > 1e-2
        tuned.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**inputs).logits, wanted)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(delta_experts(again)) == 3 + 2 + 1


def test_the_base_takes_pefts_lora(delta, inputs):
    """PEFT's own, on a weight that all experts share."""
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.up_proj", "mlp.experts.down_proj"]
    tuned = get_peft_model(delta, LoraConfig(r=2, target_modules=[], target_parameters=stacks))
    before = tuned(**inputs).logits
    tuned(**inputs).logits.square().mean().backward()
    found = [value for name, value in tuned.named_parameters() if "lora_B" in name]
    assert found
    assert all(value.grad.abs().max() > 0 for value in found)
    with torch.no_grad():
        for value in found:
            value += 0.1
        assert (tuned(**inputs).logits - before).abs().max() > 1e-3


def test_idle_deltas_are_warned_of(delta, inputs, caplog):
    tuned = get_peft_model(delta, LoraConfig(r=2, target_modules=["q_proj"])).train()
    with caplog.at_level(logging.WARNING):
        tuned(**inputs, labels=inputs["input_ids"])
    assert "modules_to_save=['router', 'deltas']" in caplog.text
    assert "target_parameters=" not in caplog.text


@pytest.mark.parametrize("train_base", [True, False])
def test_full_tuning_under_trainer_learns(delta_base, inputs, tmp_path, train_base):
    given = {part: {"train_expert_base": train_base} for part in ("text_moe", "vision_moe", "connector_moe")}
    model = AutoModelForImageTextToText.from_pretrained(delta_base, **given)
    before = {name: value.clone() for name, value in model.named_parameters()}
    rows = [{name: value[index] for name, value in inputs.items() if name != "pixel_values"} for index in range(2)]

    def collate(rows):
        made = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return made | {"pixel_values": inputs["pixel_values"], "labels": labels}

    args = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=6,
        logging_steps=1,
        disable_tqdm=True,
        activation_checkpointing=True,
    )
    trainer = Trainer(model, args, data_collator=collate, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved >= DELTAS
    bases = {name for name in before if ".experts." in name and "deltas" not in name}
    text_bases = {name for name in bases if name.startswith(TEXT)}
    assert (text_bases <= moved) == train_base
    assert train_base or not bases & moved
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-6")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_aligning_leaves_a_frozen_base_frozen(delta_base, arguments):
    frozen = AutoModelForImageTextToText.from_pretrained(delta_base, connector_moe={"train_expert_base": False})
    names = trained(prepare_model(frozen, arguments(method="align")))
    assert "model.connector.mlp.experts.deltas.up_proj_a" in names
    assert "model.connector.mlp.experts.up_proj" not in names
