"""Router losses under a trainer that makes its own loss.

The losses are attached inside the blocks (`modeling_vlmoe.router_losses`). Where the model computes the task loss,
they follow what the trainer does to it. Where it does not (TRL, `compute_loss_func`, `label_smoothing_factor`), the
model has to be told how many micro-batches share a step:

    trainer.add_callback(MicroBatchShare())
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .router_load import find_body


class MicroBatchShare(TrainerCallback):
    """Weighs each micro-batch's router losses by 1 / accumulation steps while a trainer runs."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        find_body(model).micro_batch_share = 1.0 / args.gradient_accumulation_steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        find_body(model).micro_batch_share = 1.0
