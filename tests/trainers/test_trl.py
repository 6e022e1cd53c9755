"""TRL's trainers take the model as they take any vision-language model: as an object and by the name of its folder."""

import math

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.chat_template_utils import is_chat_template_stop_token_trained

from modeling_vlmoe.finetune import follow_trainer
from tests.trainers import chats

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # trl's own default
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
]

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}


def reward(completions, **kwargs):
    """Longer answers, of the characters that can be read, are better."""
    return [float(len(completion[0]["content"])) for completion in completions]


SFT = (trl.SFTTrainer, trl.SFTConfig, {"max_length": None}, {})
DPO = (trl.DPOTrainer, trl.DPOConfig, {"max_length": None}, {})
GRPO = (
    trl.GRPOTrainer,
    trl.GRPOConfig,
    {"num_generations": 2, "max_completion_length": 4},
    {"reward_funcs": reward},
)
CASES = {
    "sft messages": (*SFT, chats.messages),
    "sft prompt and completion": (*SFT, chats.prompt_completion),
    "sft one image": (*SFT, chats.single_image),
    "dpo": (*DPO, chats.preferences),
    "grpo": (*GRPO, chats.prompts),
    "grpo one image": (*GRPO, lambda: chats.single_image().select_columns(["prompt", "image"])),
}
LORA = {
    "r": 2,
    "target_modules": r".*language_model.*\.(q_proj|v_proj)",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "modules_to_save": ["router"],
}


def build(case, model, folder, fields=(), **kwargs):
    """A trainer that router losses follow."""
    trainer_class, config_class, settings, arguments, rows = CASES[case]
    config = config_class(folder, **(COMMON | settings | dict(fields)))
    trainer = trainer_class(model, args=config, train_dataset=rows(), **(arguments | kwargs))
    follow_trainer(trainer)
    return trainer


def steps(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def learnt(batch, processor):
    """The text of each row's labels."""
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [processor.decode(ids[labels != -100]) for ids, labels in rows]


def is_idle(name):
    """The ViT's weights behind the layer that the connector reads: they never get a gradient."""
    return any(part in name for part in ("vision_tower.encoder.layers.3.", "post_layernorm", "vision_tower.head."))


def moved(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("case", CASES)
def test_a_model_and_a_folders_name_train_alike(case, base, tmp_path):
    found = []
    for given in (AutoModelForImageTextToText.from_pretrained(base), str(base)):
        processing_class = None if isinstance(given, str) else AutoProcessor.from_pretrained(base)
        trainer = build(case, given, tmp_path, processing_class=processing_class)
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
        changed = moved(trainer.model, before)
        assert {name for name in before if not is_idle(name)} == changed
        found.append(steps(trainer))
    assert len(found[0]) == 2
    for ours, by_name in zip(*found, strict=True):
        assert math.isfinite(ours["loss"])
        assert ours["loss"] == by_name["loss"]
        assert ours["aux_loss"] == by_name["aux_loss"]


@pytest.mark.parametrize("case", CASES)
def test_lora_on_attention_experts_and_routers_moves_them_alone(case, base, tmp_path):
    trainer = build(case, str(base), tmp_path, peft_config=LoraConfig(**LORA))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = moved(trainer.model, before)
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == changed
    assert all(".lora_" in name or ".modules_to_save." in name for name in changed)
    assert all(math.isfinite(step["loss"]) and step["aux_loss"] > 0 for step in steps(trainer))


def test_the_logged_aux_loss_is_mixtrals_on_our_router_logits(model, processor, tmp_path):
    trainer = build("sft messages", model, tmp_path, {"max_steps": 1}, processing_class=processor)
    batch = trainer.data_collator(list(chats.messages()))
    batch.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**batch, output_router_logits=True).router_logits
    wanted = load_balancing_loss_func(logits, 4, 2, batch["attention_mask"])
    trainer.train()
    assert steps(trainer)[0]["aux_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_assistant_only_loss_trains_exactly_what_the_assistant_says(model, processor, tmp_path):
    fields = {"assistant_only_loss": True}
    trainer = build("sft messages", model, tmp_path, fields, processing_class=processor)
    rows = [*chats.messages()]
    turns = [chats.user(1), chats.assistant("red"), chats.user(1, "and this?"), chats.assistant("green")]
    rows.append({"messages": turns, "images": [chats.picture("red"), chats.picture("green")]})
    batch = trainer.data_collator([dict(row) for row in rows])
    assert learnt(batch, processor) == [f"{answer}<|im_end|>" for _, answer in chats.ROWS] + [
        "red<|im_end|>green<|im_end|>"
    ]
    assert is_chat_template_stop_token_trained(processor)
    is_said = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_said], batch["input_ids"][is_said])
    trainer.train()
    assert all(math.isfinite(step["loss"]) for step in steps(trainer))


def test_completions_alone_are_trained(model, processor, tmp_path):
    trainer = build("sft prompt and completion", model, tmp_path, processing_class=processor)
    batch = trainer.data_collator([dict(row) for row in chats.prompt_completion()])
    assert [text.strip() for text in learnt(batch, processor)] == [f"{answer}<|im_end|>" for _, answer in chats.ROWS]


def test_dpos_reference_stays_the_base(base, tmp_path):
    """Its first margin is zero, and it is what it was when training ends."""
    wanted = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    trainer = build("dpo", str(base), tmp_path)
    trainer.train()
    assert steps(trainer)[0]["rewards/margins"] == 0.0
    assert steps(trainer)[1]["rewards/margins"] != 0.0
    assert not moved(trainer.ref_model, wanted)


def test_dpo_with_peft_takes_the_base_without_adapter_for_reference(base, tmp_path):
    trainer = build("dpo", str(base), tmp_path, peft_config=LoraConfig(**LORA))
    batch = trainer.data_collator([dict(row) for row in chats.preferences()])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    trainer.train()
    assert trainer.ref_model is None
    assert steps(trainer)[0]["rewards/margins"] == 0.0
    with torch.no_grad():
        wanted = AutoModelForImageTextToText.from_pretrained(base)(**inputs).logits
        adapted = trainer.model.eval()(**inputs).logits
        with trainer.model.disable_adapter():
            reference = trainer.model(**inputs).logits
    torch.testing.assert_close(reference, wanted, atol=0, rtol=0)
    assert (adapted - wanted).abs().max() > 1e-3


def test_text_only_rows_need_no_images_column(base, tmp_path):
    rows = chats.messages().select([1, 1, 1, 1]).remove_columns("images")
    config = trl.SFTConfig(tmp_path, assistant_only_loss=True, **COMMON)
    trainer = trl.SFTTrainer(str(base), args=config, train_dataset=rows)
    follow_trainer(trainer)
    trainer.train()
    assert all(math.isfinite(step["loss"]) and step["aux_loss"] > 0 for step in steps(trainer))
