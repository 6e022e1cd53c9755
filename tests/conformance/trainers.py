"""Every trainer on the same few rows: unlike lengths, unlike numbers of images, padded, in unequal micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, Image, List
from PIL import Image as Picture
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_vlmoe.finetune.collator import ChatCollator
from tests import models, tiny

ANSWERS = ("red", "a blue one", "the green circle at the top left", "two", "white", "no", "the red one is at the left")
COLOURS = ((200, 30, 30), (30, 30, 200), (30, 200, 30), (240, 240, 240), (90, 10, 60), (10, 90, 60), (60, 60, 60))


def picture(index: int) -> Picture.Image:
    return Picture.new("RGB", (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE), COLOURS[index % len(COLOURS)])


def user(index: int) -> dict[str, Any]:
    parts = [{"type": "image"}, {"type": "text", "text": "what colour is the shape?"[: 8 + 3 * index]}]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def rows(count: int, make: Callable[[int], dict[str, Any]]) -> Dataset:
    made = Dataset.from_list([make(index) | {"images": [picture(index)]} for index in range(count)])
    return made.cast_column("images", List(Image()))


def chat_rows(count: int) -> Dataset:
    return rows(count, lambda i: {"messages": [user(i), assistant(ANSWERS[i % 7])]})


def preference_rows(count: int) -> Dataset:
    return rows(
        count,
        lambda i: {
            "prompt": [user(i)],
            "chosen": [assistant(ANSWERS[i % 7])],
            "rejected": [assistant(ANSWERS[(i + 3) % 7])],
        },
    )


def prompt_rows(count: int) -> Dataset:
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "what colour?"[: 6 + i]}], "image": picture(i)} for i in range(count)]
    ).cast_column("image", Image())


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Unlike rewards for unlike answers, so that there is an advantage to learn from."""
    return [float(sum(map(ord, str(one))) % 7) for one in completions]


def own_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    """A user's loss, built from the model's outputs, as a mean over the step."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class OwnTrainer(Trainer):
    """A user's trainer: it passes labels on, and makes its own loss all the same."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs, targets = model(**inputs), inputs["labels"][:, 1:]
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
        return (loss, outputs) if return_outputs else loss


@dataclass(frozen=True)
class Kind:
    """A trainer, as a user makes it.

    Attributes:
        trainer: its class.
        config: the class of its arguments.
        data: rows for it.
        fields: what its arguments need besides.
        keywords: what the trainer itself needs besides.
        counts_targets: whether its loss is a mean over the step's target tokens; else over its micro-batches.
        needs_help: whether it makes its own loss, so that `follow_trainer` is called for.
    """

    trainer: type
    config: type
    data: Callable[[int], Dataset]
    fields: dict[str, Any] = field(default_factory=dict)
    keywords: dict[str, Any] = field(default_factory=dict)
    counts_targets: bool = True
    needs_help: bool = True


SFT_FIELDS = {"max_length": None}
GRPO_FIELDS = {"num_generations": 2, "max_completion_length": 4, "temperature": 1.5, "beta": 0.0}
KINDS = {
    "Trainer": Kind(Trainer, TrainingArguments, chat_rows, needs_help=False),
    "Trainer, compute_loss_func": Kind(
        Trainer, TrainingArguments, chat_rows, keywords={"compute_loss_func": own_loss}
    ),
    "Trainer, label_smoothing_factor": Kind(
        Trainer, TrainingArguments, chat_rows, fields={"label_smoothing_factor": 0.1}
    ),
    "Trainer, own compute_loss": Kind(OwnTrainer, TrainingArguments, chat_rows, counts_targets=False),
    "TRL SFT": Kind(SFTTrainer, SFTConfig, chat_rows, fields=SFT_FIELDS),
    "TRL DPO": Kind(DPOTrainer, DPOConfig, preference_rows, fields={"max_length": None}, counts_targets=False),
    "TRL GRPO": Kind(GRPOTrainer, GRPOConfig, prompt_rows, GRPO_FIELDS, counts_targets=False),
}
COMMON = {
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "remove_unused_columns": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "seed": 0,
}


def build(name: str, model: Any, processor: Any, folder: str, num_rows: int, **fields: Any) -> Trainer:
    """A trainer over `num_rows` rows."""
    kind = KINDS[name]
    keywords: dict[str, Any] = dict(kind.keywords)
    if kind.config is TrainingArguments:
        keywords["data_collator"] = ChatCollator(processor)
    if kind.trainer is GRPOTrainer:
        keywords["reward_funcs"] = reward
    return kind.trainer(
        model=model,
        args=kind.config(output_dir=folder, **(COMMON | kind.fields | fields)),
        train_dataset=kind.data(num_rows),
        processing_class=processor,
        **keywords,
    )


def processor() -> Any:
    return models.processor()
