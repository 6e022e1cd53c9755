"""A host's VLM that is sparse in place is trained as the host is: Trainer, TRL, LoRA on experts and routers."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.utils import is_torchvision_available

from modeling_vlmoe.conversion.host_processors import load_processor
from modeling_vlmoe.finetune import follow_trainer, lora_config
from modeling_vlmoe.finetune.router_load import RouterLoad
from tests import hosts
from tests.modeling_vlmoe.test_in_place import model
from tests.models import gap
from tests.slow import often
from tests.trainers import chats

FAMILIES = ["qwen2_5_vl", "smolvlm"]
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 3,
    "max_steps": 12,
    "learning_rate": 2e-2,
    "logging_steps": 1,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),  # trl's own default
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", params=often(FAMILIES, "qwen2_5_vl"))
def base(request, tmp_path_factory):
    """A family, and the folder of a tiny model of it; narrower than elsewhere, so that there is something to learn."""
    folder = tmp_path_factory.mktemp(request.param)
    made = model(request.param)
    for parameter in made.parameters():
        parameter.data *= 0.5
    made.save_pretrained(folder)
    hosts.processor(request.param).save_pretrained(folder)
    return request.param, folder


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


def adapted(folder):
    """LoRA on attention and experts of both towers, with the routers whole."""
    torch.manual_seed(0)
    whole = load(folder)
    return get_peft_model(whole, lora_config(whole, lora_r=4, lora_parts=["text", "vision"]))


def rows():
    return [
        {"text": f"which colour? {colour}", "image": hosts.picture(number)}
        for number, colour in enumerate(("red", "blue", "green"))
    ]


def collate(processor, family):
    def make(samples):
        texts = [f"{hosts.HOSTS[family].place} {one['text']}" for one in samples]
        made = processor(text=texts, images=[[one["image"]] for one in samples], padding=True, return_tensors="pt")
        made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return made

    return make


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def moved(model, folder):
    """The names of what training has changed in the base's own weights."""
    before = load(folder).state_dict()
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


def test_lora_under_trainer_learns_reloads_and_merges(base, tmp_path):
    family, folder = base
    processor, _ = load_processor(folder, family, family)
    peft = adapted(folder)
    trainer = Trainer(
        peft,
        TrainingArguments(tmp_path, **SETTINGS),
        data_collator=collate(processor, family),
        train_dataset=rows(),
    )
    with RouterLoad(peft) as routed:
        trainer.train()
    assert losses(trainer)[-1] < 0.85 * losses(trainer)[0]
    assert {part for part, _ in routed.counts} >= {"text", "vision"}
    inputs = {name: value for name, value in collate(processor, family)(rows()).items() if name != "labels"}
    with torch.no_grad():
        wanted = peft.eval()(**inputs).logits
        peft.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
        assert gap(again(**inputs).logits, wanted) <= 1e-5
        merged = again.merge_and_unload()
        assert gap(merged(**inputs).logits, wanted) <= 1e-5
        merged.save_pretrained(tmp_path / "merged")
        assert gap(load(tmp_path / "merged").eval()(**inputs).logits, wanted) <= 1e-5
    changed = moved(merged, folder)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in changed)
    assert any(name.endswith("mlp.router.weight") for name in changed)


def test_the_trainer_saves_what_comes_back(base, tmp_path):
    family, folder = base
    processor, _ = load_processor(folder, family, family)
    trainer = Trainer(
        load(folder),
        TrainingArguments(tmp_path, **(SETTINGS | {"max_steps": 2, "learning_rate": 1e-3})),
        data_collator=collate(processor, family),
        train_dataset=rows(),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert all(torch.equal(again.get_parameter(name), one) for name, one in trainer.model.named_parameters())
    assert (tmp_path / "saved" / "modeling_in_place.py").is_file()
    assert type(load_processor(tmp_path / "saved", family, family)[0]).__name__ == type(processor).__name__


def messages():
    made = [
        {"messages": [chats.user(1), chats.assistant(colour)], "images": [hosts.picture(number)]}
        for number, colour in enumerate(("red", "blue", "green"))
    ]
    return Dataset.from_list(made)


def test_lora_under_trl_learns(base, tmp_path):
    """TRL computes the loss itself, of what the body gives; the router losses are attached there."""
    family, folder = base
    # SmolVLM's chats ask its video processor, which needs torchvision; Idefics3's has the same tokens and tiles.
    chats = "idefics3" if family == "smolvlm" and not is_torchvision_available() else family
    processor = hosts.processor(chats)
    peft_config = lora_config(load(folder), lora_r=4)
    config = trl.SFTConfig(tmp_path, max_length=None, **(SETTINGS | {"gradient_checkpointing": False}))
    trainer = trl.SFTTrainer(
        load(folder), args=config, train_dataset=messages(), processing_class=processor, peft_config=peft_config
    )
    follow_trainer(trainer)
    routers = [name for name, _ in trainer.model.named_parameters() if "router" in name and "default" in name]
    before = {name: trainer.model.get_parameter(name).clone() for name in routers}
    trainer.train()
    assert losses(trainer)[-1] < 0.85 * losses(trainer)[0]
    assert before
    assert all(not torch.equal(trainer.model.get_parameter(name), value) for name, value in before.items())
    assert "aux_loss" in trainer.state.log_history[0]


def router_gradients(folder, family, weights, call):
    """The routers' gradients when a trainer calls the model in its own way, with these (balance, z) weights."""
    made = load(folder).train()
    for part in ("text", "vision"):
        made.config.moe(part).router_aux_loss_coef, made.config.moe(part).router_z_loss_coef = weights
    processor, _ = load_processor(folder, family, family)
    call(made, dict(collate(processor, family)(rows()))).backward()
    return {name: one.grad for name, one in made.named_parameters() if name.endswith("router.weight")}


def by_labels(model, inputs):
    return model(**inputs).loss


def by_the_body(model, inputs):
    """As TRL: the body alone, and a loss that the model does not see."""
    labels = inputs.pop("labels")
    hidden = model.model(**inputs).last_hidden_state
    logits = model.get_output_embeddings()(hidden)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def test_the_body_alone_carries_the_same_router_losses(base):
    family, folder = base
    added = []
    for call in (by_labels, by_the_body):
        with_losses = router_gradients(folder, family, (0.5, 0.1), call)
        without = router_gradients(folder, family, (0.0, 0.0), call)
        added.append({name: with_losses[name] - without[name] for name in without if "connector" not in name})
    for name, gradient in added[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(added[1][name], gradient, atol=1e-5, rtol=1e-3)
