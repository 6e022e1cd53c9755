"""One training run of a classifier, by transformers' Trainer: AdamW, cross-entropy, and per epoch the train loss, the
test loss and the accuracy.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from .arguments import ClassifyArguments
from .batches import ClassificationCollator, RowReader
from .data import Data
from .models import text_gates_of

EVAL_BATCH = 256
HISTORY = "history.json"


def accuracy_of(prediction: Any) -> dict[str, float]:
    """The share of right classes, as the Trainer asks for it."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


class EpochLosses(TrainerCallback):
    """Collects the epochs' losses and accuracies, and says each as one line.

    Args:
        say: takes a line.

    Attributes:
        epochs: `epoch`, `train_loss`, `test_loss` and `accuracy` of each.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say, self.train_loss = say, float("nan")
        self.epochs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Takes the train loss, which the Trainer logs before it evaluates, and then the evaluation."""
        logs = logs or {}
        if "loss" in logs:
            self.train_loss = logs["loss"]
        if "eval_loss" in logs:
            found = {
                "epoch": round(logs["epoch"]),
                "train_loss": self.train_loss,
                "test_loss": logs["eval_loss"],
                "accuracy": logs["eval_accuracy"],
            }
            self.epochs.append(found)
            self.say(
                f"epoch {found['epoch']:>3}: train loss {found['train_loss']:.4f}, test loss "
                f"{found['test_loss']:.4f}, accuracy {found['accuracy']:.4f}"
            )


class ClassifierTrainer(Trainer):
    """A Trainer with another collator for the test, which moves no image, and a learning rate of the text gates' own.

    Args:
        test_collator: for evaluation and prediction.
        gate_learning_rate: peak learning rate of the text gates.
        **kwargs: as `Trainer` takes them.
    """

    def __init__(self, test_collator: Any, gate_learning_rate: float, **kwargs: Any):
        self.train_collator, self.test_collator = kwargs["data_collator"], test_collator
        self.gate_learning_rate = gate_learning_rate
        super().__init__(**kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW as the Trainer makes it, the routers in a group of their own."""
        trained: Any = self.model
        if self.optimizer is None and (gates := {id(one) for one in text_gates_of(trained)}):
            decayed = set(self.get_decay_parameter_names(trained))
            rest: dict[bool, list[Any]] = {True: [], False: []}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad and id(parameter) not in gates:
                    rest[name in decayed].append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = [
                {"params": rest[True], "weight_decay": self.args.weight_decay},
                {"params": rest[False], "weight_decay": 0.0},
                {"params": text_gates_of(trained), "weight_decay": 0.0, "lr": self.gate_learning_rate},
            ]
            self.optimizer = optimizer_class(groups, **options)
        return super().create_optimizer()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, with the collator of the test."""
        with self._unmoved():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, with the collator of the test."""
        with self._unmoved():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        self.data_collator = self.test_collator
        try:
            yield
        finally:
            self.data_collator = self.train_collator


def train_classifier(
    model: Any,
    processor: Any,
    data: Data,
    args: ClassifyArguments,
    folder: Path,
    seed: int,
    epochs: int,
    say: Callable[[str], None],
) -> Trainer:
    """Trains a model in place, and writes its history into a folder.

    Args:
        model: a `VLMoEForSequenceClassification`.
        processor: its processor.
        data: rows to train and to judge on.
        args: batch size, learning rates, how images are moved.
        folder: where `history.json` goes.
        seed: of the batches.
        epochs: how many.
        say: takes a line per epoch.

    Returns:
        The trainer, to predict with.
    """
    set_seed(seed)
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=EVAL_BATCH,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.05,
        adam_beta2=0.98,  # runs are short
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
        seed=seed,
    )
    losses, reader = EpochLosses(say), RowReader(processor)
    trainer = ClassifierTrainer(
        test_collator=ClassificationCollator(reader, data.labels),
        gate_learning_rate=args.gate_learning_rate,
        model=model,
        args=settings,
        data_collator=ClassificationCollator(reader, data.labels, args.shift, args.turn),
        train_dataset=data.train,
        eval_dataset=data.test,
        compute_metrics=accuracy_of,
        callbacks=[losses],
    )
    trainer.remove_callback(PrinterCallback)  # the lines are ours
    trainer.train()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HISTORY).write_text(json.dumps(losses.epochs, indent=1), encoding="utf-8")
    return trainer


def predict_labels(trainer: Trainer, data: Data) -> list[str]:
    """The model's class of each test row."""
    found = trainer.predict(data.test)  # type: ignore[arg-type]
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return [data.labels[index] for index in np.asarray(logits).argmax(-1)]
