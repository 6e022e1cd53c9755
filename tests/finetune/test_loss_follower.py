"""A classifier's loss is a mean over samples: its gradients do not grow with the accumulation steps either."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_vlmoe import VLMoEForSequenceClassification
from modeling_vlmoe.finetune import follow_trainer
from tests import models, tiny

ROUTER = "model.language_model.layers.2.mlp.router.weight"
# One expert per token: renormalised, its weight is 1, so the task loss has no gradient on the router.
ONLY_Z = {"num_experts": 4, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}
PARTS = {"text_moe": ONLY_Z, "vision_moe": None, "connector_moe": None}


class Gradients(TrainerCallback):
    """Notes the gradients of the one step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_loss(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def train(model, folder, steps, compute_loss_func):
    """The gradients of one step over four rows of equal length, so that every micro-batch has the same share."""
    gradients = Gradients()
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4 // steps,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    rows = [{"input_ids": models.tokens(0, 8, seed=seed), "labels": seed % 2} for seed in range(4)]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[gradients], compute_loss_func=compute_loss_func)
    follow_trainer(trainer)
    trainer.train()
    return gradients.found


@pytest.mark.parametrize("compute_loss_func", [None, own_loss])
def test_a_classifiers_gradients_are_the_same_for_one_two_and_four_micro_batches(tmp_path, compute_loss_func):
    found = []
    for steps in (1, 2, 4):
        model = tiny.redraw(VLMoEForSequenceClassification(models.sparse_config(num_labels=2, **PARTS)))
        found.append(train(model, tmp_path, steps, compute_loss_func))
    for gradients in found[1:]:
        for name in (ROUTER, "score.weight"):
            wanted = found[0][name]
            assert (gradients[name] - wanted).norm() < 1e-4 * wanted.norm()
