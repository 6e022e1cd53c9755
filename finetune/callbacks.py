"""The experts' load in the logs: per layer for TensorBoard and the like, three numbers for the progress bar."""

from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .router_load import Layer, RouterLoad

PREFIX = "router/"
# What is shown beside the loss; the rest goes to the reporters and to `trainer.state.log_history`.
SHOWN = ("router/max_load", "router/min_entropy", "router/dead_experts")


def layer_name(layer: Layer) -> str:
    """A layer in the logs: "text/layer_3", "connector"."""
    part, index = layer
    return part if index is None else f"{part}/layer_{index}"


def load_logs(load: RouterLoad) -> dict[str, float]:
    """What was counted, as log entries: per layer, and the worst of all layers."""
    logs: dict[str, float] = {}
    summaries = load.summary()
    for layer, summary in summaries.items():
        name = f"{PREFIX}{layer_name(layer)}"
        logs[f"{name}/max_load"] = summary.max_load
        logs[f"{name}/entropy"] = summary.entropy
        logs[f"{name}/dead_experts"] = summary.dead_experts
    for layer, losses in load.mean_losses().items():
        name = f"{PREFIX}{layer_name(layer)}"
        logs[f"{name}/balance_loss"], logs[f"{name}/z_loss"] = losses.tolist()
    if summaries:
        worst = (
            max(summary.max_load for summary in summaries.values()),
            min(summary.entropy for summary in summaries.values()),
            sum(summary.dead_experts for summary in summaries.values()),
        )
        logs |= dict(zip(SHOWN, worst, strict=True))
    return logs


class RouterLoadCallback(TrainerCallback):
    """Adds the load since the last log to each log of training; put in place by `log_router_load`."""

    def __init__(self) -> None:
        self.load: RouterLoad | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.load = RouterLoad(model, training_only=True).attach()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.load is None or "loss" not in logs:
            return
        entries = load_logs(self.load)
        self.load.reset()
        logs.update(entries)
        if state.log_history:
            state.log_history[-1].update(entries)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.load is not None:
            self.load.detach()
        self.load = None


def _shown(logs: dict[str, Any] | None) -> dict[str, Any] | None:
    if logs is None:
        return None
    return {name: value for name, value in logs.items() if not name.startswith(PREFIX) or name in SHOWN}


class ShortProgressCallback(ProgressCallback):
    """The host's progress bar without the entries of every layer."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_shown(logs), **kwargs)


class ShortPrinterCallback(PrinterCallback):
    """The host's printed logs, where bars are off, without the entries of every layer."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_shown(logs), **kwargs)


def log_router_load(trainer: Trainer) -> RouterLoadCallback:
    """Makes a trainer log the experts' load; also one of TRL's.

    Returns:
        The callback, which runs before the reporters so that they see what it adds.
    """
    callback = RouterLoadCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    for whole, short in ((ProgressCallback, ShortProgressCallback), (PrinterCallback, ShortPrinterCallback)):
        if trainer.pop_callback(whole) is not None:
            trainer.add_callback(short)
    return callback
