"""Runs of a plain Trainer over chats with and without images, the same in every process that compares them."""

import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from modeling_vlmoe.finetune import ChatCollator, lora_config
from tests.trainers import chats

METHODS = ("full", "lora")


def build_model(folder, method="full", **kwargs):
    """The model of a folder, all of it trained or with LoRA on attention and experts of both towers and the routers
    and the connector whole.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    if method == "full":
        return model
    torch.manual_seed(0)  # LoRA's first matrix is drawn
    return get_peft_model(model, lora_config(model, lora_r=2, lora_parts=["text", "vision"], train_connector=True))


def build_trainer(base, model, output_dir, rows=chats.ROWS, compute_metrics=None, **fields):
    """Two micro-batches of one row per step, router losses on, as the model has them."""
    processor = AutoProcessor.from_pretrained(base)
    settings = {
        "max_steps": 5,
        "save_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }
    return Trainer(
        model,
        TrainingArguments(output_dir, **(settings | fields)),
        data_collator=ChatCollator(processor),
        train_dataset=chats.chat_rows(rows),
        eval_dataset=chats.chat_rows(rows),
        processing_class=processor,
        compute_metrics=compute_metrics,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
