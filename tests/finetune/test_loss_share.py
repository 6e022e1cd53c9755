"""The router losses' gradient does not grow with the accumulation steps, whoever computes the task loss."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_vlmoe import VLMoEForSequenceClassification
from modeling_vlmoe.finetune.loss_share import MicroBatchShare
from tests import models, tiny

ROUTER = "model.language_model.layers.2.mlp.router.weight"
# One expert per token: renormalised, its weight is 1, so the task loss has no gradient on the router.
ONLY_Z = {"num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}
PARTS = {"text_moe": ONLY_Z, "vision_moe": None, "connector_moe": None}


class Gradients(TrainerCallback):
    """Notes the gradients of the one step."""

    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def arguments(folder, steps, **fields):
    return TrainingArguments(
        folder,
        per_device_train_batch_size=4 // steps,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0,
        learning_rate=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        **fields,
    )


def rows(labels):
    """Four rows of equal length, so that every micro-batch has the same share."""
    ids = [models.tokens(0, 8, seed=seed) for seed in range(4)]
    return [{"input_ids": row, "labels": labels(index, row)} for index, row in enumerate(ids)]


def ratio(found, wanted):
    return (found - wanted).norm() / wanted.norm()


def train(model, folder, steps, data, callbacks=(), compute_loss_func=None, **fields):
    gradients = Gradients()
    trainer = Trainer(
        model,
        arguments(folder, steps, **fields),
        train_dataset=data,
        callbacks=[gradients, *callbacks],
        compute_loss_func=compute_loss_func,
    )
    trainer.train()
    return gradients.found


def own_loss(outputs, labels, num_items_in_batch=None):
    """A user's loss, built from the model's outputs, as a mean over the step."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("callbacks", "fields"),
    [
        ((), {}),
        ((MicroBatchShare(),), {"compute_loss_func": own_loss}),
        ((MicroBatchShare(),), {"label_smoothing_factor": 0.1}),
    ],
    ids=["models_loss", "own_loss", "label_smoothing"],
)
def test_router_gradient_is_the_same_for_one_two_and_four_micro_batches(tmp_path, callbacks, fields):
    found = [
        train(models.sparse_model(**PARTS), tmp_path, steps, rows(lambda _, row: row), callbacks, **fields)
        for steps in (1, 2, 4)
    ]
    for gradients in found[1:]:
        assert ratio(gradients[ROUTER], found[0][ROUTER]) < 1e-4
        assert ratio(gradients["lm_head.weight"], found[0]["lm_head.weight"]) < 1e-4


def test_a_classifiers_gradients_are_the_same_for_one_two_and_four_micro_batches(tmp_path):
    found = []
    for steps in (1, 2, 4):
        model = tiny.redraw(VLMoEForSequenceClassification(models.sparse_config(num_labels=2, **PARTS)))
        found.append(train(model, tmp_path, steps, rows(lambda index, _: index % 2)))
    for gradients in found[1:]:
        assert ratio(gradients[ROUTER], found[0][ROUTER]) < 1e-4
        assert ratio(gradients["score.weight"], found[0]["score.weight"]) < 1e-4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl's own default
def test_trls_supervised_trainer_keeps_the_router_gradient(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_list([{"text": "what colour is the shape?"}] * 4)
    processor = models.processor()
    found = []
    for steps in (1, 2, 4):
        gradients = Gradients()
        settings = {name: value for name, value in vars(arguments(tmp_path, steps)).items() if name in KEPT}
        trainer = SFTTrainer(
            models.sparse_model(image_token_id=processor.image_token_id, **PARTS),
            SFTConfig(tmp_path, use_cpu=True, bf16=False, report_to="none", save_strategy="no", **settings),
            train_dataset=texts,
            processing_class=processor.tokenizer,
            callbacks=[gradients, MicroBatchShare()],
        )
        trainer.train()
        found.append(gradients.found)
    for later in found[1:]:
        assert ratio(later[ROUTER], found[0][ROUTER]) < 1e-4


KEPT = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "max_grad_norm",
    "learning_rate",
    "disable_tqdm",
)
