"""A training that is watched: what goes wrong first is said when it happens.

    watch = watch_training(trainer)
    trainer.train()       # a ValueError at the first loss or gradient that is not finite, before its step is made
    watch.account.notices

Every step, before gradients are clipped, the losses and gradients of all processes are looked at together, so that
all of them stop at the same step. No step is made with numbers that are not finite, and no weights that are not finite
are written.
"""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..callbacks import RouterLoadCallback
from .account import NOT_FINITE, STALLED, Account, Notice, TrainingFailed
from .diagnosis import UPDATE, Cause, find_cause
from .finite import gradient_norm, local, spoiled_weights
from .loss_trend import Facts, Movement, find_trend, reason, trained_state
from .places import Places
from .remedies import remedies
from .row_notes import name_rows, note_rows, take_rows
from .together import Looked, all_say, look_together

logger = logging.getLogger(__name__)

STEPS = 200
SHOWN = 4  # figures of steps before
ASKED_EACH = 10  # steps: which tensors get a gradient
TOLERATED = 20  # steps in a row that fp16's scaler may leave out while it looks for a scale


@dataclass
class _Step:
    """What is known of the step that is being made: its micro-batches with their rows, and their losses."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    num_targets: int = 0
    is_over: bool = False

    def bad(self) -> int:
        """The first micro-batch whose loss is not finite, else the last."""
        found = (index for index, loss in enumerate(self.losses) if not torch.isfinite(loss).all())
        return next(found, len(self.losses) - 1)


class TrainingWatch(TrainerCallback):
    """Watches one trainer; made by `watch_training`.

    Args:
        trainer: what is watched.
        steps: optimizer steps after which the loss should have fallen.
        folder: where the account is kept; None keeps no file.

    Attributes:
        account: all that was wrong.
        losses: of each step so far, the mean over processes.
    """

    def __init__(self, trainer: Trainer, steps: int, folder: Path | None):
        self.trainer, self.steps = trainer, steps
        self.account = Account(folder)
        self.losses: list[float] = []
        self._norms: deque[float] = deque(maxlen=SHOWN)
        self._step = _Step()
        self._rate = 0.0
        self._num_targets = 0
        self._num_moving = 0
        self._num_left_out = 0
        self._is_judged = False
        self._movement: Movement | None = None

    # What the trainer calls

    def attach(self) -> None:
        """Puts itself around the trainer's steps."""
        trainer = self.trainer
        make_step, compute_loss = trainer.training_step, trainer.compute_loss

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            self._begin(inputs)
            try:
                loss = make_step(model, inputs, *args, **kwargs)
            except (RuntimeError, MemoryError, OSError) as error:
                error.add_note(self.where())  # where memory runs out, the account names the step
                raise
            self._step.losses.append(loss.detach())
            if trainer.accelerator.sync_gradients:
                self._look()
            return loss

        def computed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = compute_loss(model, inputs, *args, **kwargs)
            # DeepSpeed makes its step inside of backward.
            if trainer.is_deepspeed_enabled and model.training:
                self._look_early(result[0] if isinstance(result, tuple) else result)
            return result

        trainer.training_step = training_step  # type: ignore[method-assign]
        trainer.compute_loss = computed  # type: ignore[method-assign]
        note_rows(trainer)
        trainer.add_callback(self)

    def where(self) -> str:
        """The step that is being made, and its rows."""
        rows = [row for batch in self._step.rows for row in batch]
        return f"in step {self.trainer.state.global_step + 1}, with {name_rows(rows)}"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.account.take_up(state)
        self.account.write()
        self.losses, self._is_judged, self._step = [], False, _Step()
        self._movement = Movement(self._model()) if self.steps else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps and not self._is_judged and len(self.losses) >= self.steps + self._warmup(args, state):
            self._judge_loss(state)
        if control.should_save or control.should_evaluate:
            self._check_weights(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save or control.should_evaluate:
            self._check_weights(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._take_alarms(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_weights(state)
        if self.steps and not self._is_judged:
            self._judge_loss(state)
        self._take_alarms(state)

    # Numbers that are not finite

    def _model(self) -> Any:
        return self.trainer.model

    def _begin(self, inputs: Any) -> None:
        """Takes the rows' numbers out of a micro-batch, and keeps it until its step is made."""
        if self._step.is_over:
            self._step = _Step()
        self._step.rows.append(take_rows(inputs))
        kept = dict(inputs) if isinstance(inputs, Mapping) else {}
        self._step.batches.append(kept)
        if isinstance(labels := kept.get("labels"), Tensor):
            self._step.num_targets += int((labels != -100).sum())

    def _look(self) -> None:
        """Looks at a whole step, with the other processes."""
        self._step.is_over = True
        losses = torch.stack([loss.float().sum() for loss in self._step.losses])
        parameters = [one for one in self._model().parameters() if one.requires_grad]
        scaler = self.trainer.accelerator.scaler
        norm = gradient_norm(parameters).to(losses.device) / (1.0 if scaler is None else scaler.get_scale())
        looked = look_together(losses, norm)
        if scaler is not None and looked.is_loss_finite:
            self._num_left_out = 0 if looked.is_finite else self._num_left_out + 1
            if not looked.is_finite and self._num_left_out < TOLERATED:
                return
        if not looked.is_finite:
            self._stop(looked)
        self._note(looked, parameters)

    def _note(self, looked: Looked, parameters: list[Any]) -> None:
        """Keeps the figures of a step that is as it should be."""
        self.losses.append(looked.loss)
        self._norms.append(float(looked.norm))
        self._rate = max(self._rate, self._learning_rate())
        self._num_targets += self._step.num_targets
        if self._is_judged or (len(self.losses) > 1 and len(self.losses) % ASKED_EACH):
            return
        moving = [one for one in parameters if one.grad is not None and bool(local(one.grad).any())]
        if self.trainer.is_deepspeed_enabled:
            moving = parameters  # it keeps the gradients to itself
        self._num_moving = max(self._num_moving, len(moving))

    def _look_early(self, loss: Tensor) -> None:
        """Looks at a micro-batch's loss before anything is made of it."""
        looked = look_together(loss.detach().float().reshape(1), torch.zeros((), device=loss.device))
        if not looked.is_finite:
            self._step.losses.append(loss.detach())
            self._stop(looked)

    def _stop(self, looked: Looked) -> None:
        """Ends the run, in the same words in every process.

        Raises:
            TrainingFailed: with what was not finite first, its figures, and what to do.
        """
        index = self._step.bad()
        is_loss_finite = bool(torch.isfinite(self._step.losses[index]).all())
        cause = find_cause(self.trainer, self._step.batches[index], is_loss_finite)
        rows = self._step.rows[index]
        if cause.rows is not None and max(cause.rows, default=0) < len(rows):
            rows = [rows[place] for place in cause.rows]
        step = self.trainer.state.global_step + 1
        what = "a gradient is" if looked.is_loss_finite else "the loss is"
        told = all_say((not is_loss_finite, name_rows(rows), cause))
        _, named, cause = max(told, key=lambda one: one[0])  # of several processes one whose loss was not finite
        self._fail(step, f"Training stopped at step {step}: {what} not finite, of {named}.", cause)

    def _fail(self, step: int, head: str, cause: Cause) -> None:
        """Raises what `_stop` says, after writing it down."""
        figures = {
            "losses_before": [round(loss, 4) for loss in self.losses[-SHOWN:]],
            "gradient_norms_before": [round(norm, 4) for norm in self._norms],
            "learning_rate": self._learning_rate(),
            "first_not_finite": cause.words,
        }
        ways = remedies(cause, self.trainer.args, self._learning_rate(), step)
        lines = [
            head,
            f"First not finite: {cause.words}.",
            f"Before: losses {self._shown(self.losses)}; gradient norms {self._shown(self._norms)}; learning rate "
            f"{self._learning_rate():.3g}.",
            "What to do:",
            *(f"  {way}" for way in ways),
            self._kept(cause),
        ]
        notice = Notice(NOT_FINITE, step, "\n".join(lines), figures)
        self.account.tell(notice, self.trainer.state)
        raise TrainingFailed(notice)

    def _kept(self, cause: Cause) -> str:
        """What is left to go on from."""
        best = self.trainer.state.best_model_checkpoint
        folder = str(self.trainer.args.output_dir)
        last = best or (get_last_checkpoint(folder) if Path(folder).is_dir() else None)
        if last is None:
            return "No checkpoint had been written, and none was of this step."
        is_of_chain = getattr(self.trainer.args, "stage_prefix", None) is not None
        way = "the same command goes on from it" if is_of_chain else f"resume_from_checkpoint={last}"
        return f"The step was not written. The last checkpoint is {last}: {way}."

    @staticmethod
    def _shown(numbers: Any) -> str:
        last = list(numbers)[-SHOWN:]
        return ", ".join(f"{number:.4g}" for number in last) or "none"

    def _learning_rate(self) -> float:
        optimizer = self.trainer.optimizer
        rates = [float(group["lr"]) for group in optimizer.param_groups] if optimizer is not None else []
        return max(rates, default=0.0)

    def _check_weights(self, state: TrainerState) -> None:
        """Refuses to go on to writing weights that are not finite.

        Raises:
            TrainingFailed: as `_stop`.
        """
        names = spoiled_weights(self._model())
        found = [one for one in all_say(names[:1]) if one]
        if not found:
            return
        cause = Cause(UPDATE, f"the weights of {Places(self._model())(found[0][0])}, after this step")
        head = f"Training stopped at step {state.global_step}: its step made weights that are not finite."
        self._fail(state.global_step, head, cause)

    # A loss that does not fall

    def _warmup(self, args: TrainingArguments, state: TrainerState) -> int:
        return args.get_warmup_steps(state.max_steps)

    def _judge_loss(self, state: TrainerState) -> None:
        """Says once that the loss does not fall, with its figures and the likely reason."""
        self._is_judged = True
        trend = find_trend(self.losses)
        if trend is None or trend.falls or self._movement is None:
            return
        facts = Facts(
            steps=len(self.losses),
            rate=self._rate,
            num_moving=self._num_moving,
            num_targets=self._num_targets / len(self.losses),
            moved=self._movement.share(self._model()),
            **trained_state(self._model()),
        )
        words = (
            f"Loss not falling: after {facts.steps} steps the median of the last {trend.window} is {trend.last:.4g}, "
            f"that of the first {trend.window} was {trend.first:.4g}. {reason(trend, facts)}"
        )
        figures = {"first": trend.first, "last": trend.last, "learning_rate": facts.rate, "moved": facts.moved}
        self.account.tell(Notice(STALLED, state.global_step, words, figures), state)
        if state.is_world_process_zero:
            logger.warning("%s", words)

    # Alarms of the routing

    def _take_alarms(self, state: TrainerState) -> None:
        """Notes what the log of the experts' load has warned of."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, RouterLoadCallback):
                for alarm in callback.alarms:
                    where = {"part": alarm.layer[0], "layer": alarm.layer[1], "modality": alarm.modality}
                    self.account.tell(Notice(alarm.kind, state.global_step, alarm.words, where), state)


def watch_training(trainer: Trainer, steps: int = STEPS, folder: str | Path | None = None) -> TrainingWatch:
    """Has a training say what goes wrong first: transformers' Trainer or one of TRL's, with a vlmoe model.

    Args:
        trainer: before `train()`, after `follow_trainer` where that is used.
        steps: optimizer steps after which the loss should have fallen; 0 does not ask.
        folder: where `finetune_alarms.json` is written; the trainer's output folder where None.

    Returns:
        What watches it, with its `account`.

    Raises:
        ValueError: if `steps` is below 0, or the trainer's model is no vlmoe model.
    """
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected 0 or more.")
    Places(trainer.model)  # type: ignore[arg-type]
    is_kept = trainer.is_world_process_zero()
    watch = TrainingWatch(trainer, steps, Path(folder or str(trainer.args.output_dir)) if is_kept else None)
    watch.attach()
    return watch
