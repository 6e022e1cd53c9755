"""The experts' load in the logs: per layer for TensorBoard and the like, three numbers for the progress bar; and what
is wrong with the routing, in words, each thing once (see routing_alarms.py).
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from .expert_similarity import Similarity, experts_similarity, find_blocks
from .router_load import IMAGE, TEXT, Layer, RouterLoad, summarize
from .routing_alarms import Alarm, AlarmLimits, dead_alarm, identical_alarm, saturated_alarm

logger = logging.getLogger(__name__)

MODALITIES = {TEXT: "text", IMAGE: "image"}
SAMPLED_ROWS = 32  # of each weight of the experts that are compared at a log
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
    logs |= modality_logs(load)
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


def modality_logs(load: RouterLoad) -> dict[str, float]:
    """Per layer and modality: the mean top probability; and where a layer saw both, the load of each."""
    logs: dict[str, float] = {}
    for layer, by_kind in load.mean_confidence().items():
        for kind, (confidence, _) in by_kind.items():
            logs[f"{PREFIX}{layer_name(layer)}/{MODALITIES[kind]}/top_probability"] = confidence
    for layer, count_ME in load.counts.items():
        seen = count_ME.sum(-1) > 0
        for kind, modality in MODALITIES.items():
            if seen.all():
                summary, name = (
                    summarize(count_ME[kind][load.open[layer][kind]]),
                    f"{PREFIX}{layer_name(layer)}/{modality}",
                )
                logs[f"{name}/max_load"], logs[f"{name}/entropy"] = summary.max_load, summary.entropy
    return logs


@torch.no_grad()
def trained_similarities(body: Any) -> dict[Layer, Similarity]:
    """How alike the experts of each layer are whose experts are trained, by a sample of their weights."""
    found = {}
    for layer, block in find_blocks(body).items():
        if any(parameter.requires_grad for parameter in block.experts.parameters()):
            similarity = experts_similarity(block.experts, SAMPLED_ROWS)
            if similarity is not None:
                found[layer] = similarity
    return found


class RoutingWatch:
    """Raises each alarm of a training run once.

    Args:
        limits: when an alarm is raised.

    Attributes:
        alarms: those that were raised.
        idle: for each layer, the assignments since each expert last got one, (experts,).
    """

    def __init__(self, limits: AlarmLimits | None = None):
        self.limits = limits or AlarmLimits()
        self.alarms: list[Alarm] = []
        self.idle: dict[Layer, Tensor] = {}

    def look(self, load: RouterLoad, similarities: dict[Layer, Similarity], steps: int) -> list[Alarm]:
        """What is newly wrong.

        Args:
            load: what was counted since the last look.
            similarities: how alike the trained experts are.
            steps: optimizer steps of this run.
        """
        found: list[Alarm | None] = []
        for layer, count_ME in load.counts.items():
            count_E, open_E = count_ME.sum(0).cpu(), load.open[layer].any(0).cpu()
            waited_E = self.idle.get(layer, torch.zeros_like(count_E)) + open_E * count_E.sum()
            idle_E = waited_E * (count_E == 0)
            self.idle[layer] = idle_E
            found.append(dead_alarm(layer, idle_E.tolist(), int(count_E.sum()), self.limits))
        for layer, by_kind in load.mean_confidence().items():
            for kind, (confidence, number) in by_kind.items():
                found.append(saturated_alarm(layer, confidence, number, self.limits, MODALITIES[kind]))
        for layer, similarity in similarities.items():
            found.append(identical_alarm(layer, similarity.distance, self.limits, steps))
        said = {alarm.key for alarm in self.alarms}
        raised = [alarm for alarm in found if alarm is not None and alarm.key not in said]
        self.alarms += raised
        return raised


class RouterLoadCallback(TrainerCallback):
    """Adds the load since the last log to each log of training, and warns once of what is wrong.

    `log_router_load(trainer)` puts it before the reporters, so that they see what it adds; given to a Trainer as one
    of its `callbacks`, it writes to `trainer.state.log_history` and warns, and the reporters do not see it.

    Args:
        has_alarms: whether it warns.
        limits: when; see `AlarmLimits`.

    Attributes:
        load: what is counted, while a training runs.
        alarms: what it has warned of in the last training.
    """

    def __init__(self, has_alarms: bool = True, limits: AlarmLimits | None = None) -> None:
        self.load: RouterLoad | None = None
        self.has_alarms, self.limits = has_alarms, limits
        self.watch = RoutingWatch(limits)
        self._first_step = 0

    @property
    def alarms(self) -> list[Alarm]:
        return self.watch.alarms

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.load = RouterLoad(model, training_only=True).attach()
        self.watch, self._first_step = RoutingWatch(self.limits), state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.load is None or "loss" not in logs:
            return
        similarities = trained_similarities(self.load.body)
        entries = load_logs(self.load)
        for layer, similarity in similarities.items():
            entries[f"{PREFIX}{layer_name(layer)}/expert_similarity"] = similarity.cosine
            entries[f"{PREFIX}{layer_name(layer)}/expert_distance"] = similarity.distance
        if self.has_alarms and state.is_world_process_zero:
            for alarm in self.watch.look(self.load, similarities, state.global_step - self._first_step):
                logger.warning("%s", alarm.words)
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


def log_router_load(
    trainer: Trainer, has_alarms: bool = True, limits: AlarmLimits | None = None
) -> RouterLoadCallback:
    """Makes a trainer log the experts' load, and warn of what is wrong with the routing; also one of TRL's.

    Args:
        trainer: before `train()`.
        has_alarms: whether it warns.
        limits: when; see `AlarmLimits`.

    Returns:
        The callback, which runs before the reporters so that they see what it adds.
    """
    callback = RouterLoadCallback(has_alarms, limits)
    trainer.callback_handler.callbacks.insert(0, callback)
    for whole, short in ((ProgressCallback, ShortProgressCallback), (PrinterCallback, ShortPrinterCallback)):
        if trainer.pop_callback(whole) is not None:
            trainer.add_callback(short)
    return callback
