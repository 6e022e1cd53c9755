"""One cell of the conformance table: a trainer in a setting, its router gradient against the oracle's."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, set_seed

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.finetune import follow_trainer
from modeling_vlmoe.finetune.router_load import find_body
from modeling_vlmoe.moe_config import PARTS
from tests import models

from .oracle import MicroBatch, oracle_gradients
from .trainers import KINDS, build, processor

# What of the router losses is on: the coefficients (balance, z).
LOSSES = {"balance": (5.0, 0.0), "z": (0.0, 0.3), "both": (5.0, 0.3)}
OFF = (0.0, 0.0)
ACCUMULATED = {"gradient_accumulation_steps": 3}
ROWS, ROWS_PER_BATCH = 10, 2  # five micro-batches: a step of three, and one of the two that are left
SCALE = 1024.0
# What a body is given of a batch; the last three by hosts whose images have sizes of their own.
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "pixel_attention_mask")


@dataclass(frozen=True)
class Setting:
    """How a trainer is run.

    Attributes:
        fields: of its arguments.
        has_scaler: whether the loss is scaled as for fp16.
        has_lora: whether experts get LoRA and routers are trained by PEFT, all else frozen.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    has_scaler: bool = False
    has_lora: bool = False


def checkpointing(use_reentrant: bool) -> dict[str, Any]:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


SETTINGS = {
    "one micro-batch": Setting(),
    "accumulation": Setting(ACCUMULATED),
    "fp16's scaler": Setting(ACCUMULATED, has_scaler=True),
    "checkpointing": Setting(ACCUMULATED | checkpointing(False)),
    "checkpointing, reentrant": Setting(ACCUMULATED | checkpointing(True)),
    "LoRA on experts": Setting(ACCUMULATED, has_lora=True),
}


@dataclass
class Steps:
    """What a run leaves: per optimizer step its gradients and micro-batches."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    batches: list[list[MicroBatch]] = field(default_factory=list)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Recorder(TrainerCallback):
    """Notes what each micro-batch gave the model's body, and each step's gradients."""

    def __init__(self, trainer: Any, scale: float):
        self.steps, self.pending, self.scale = Steps(), [], scale
        self.body = find_body(trainer.model)
        self.body.register_forward_pre_hook(self._note, with_kwargs=True)
        training_step = trainer.training_step

        def step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
            targets = None if labels is None else int((labels[..., 1:] != -100).sum())
            count = len(self.pending)
            result = training_step(model, inputs, *args, **kwargs)
            assert len(self.pending) == count + 1, "one pass of the model per micro-batch was expected"
            self.pending[-1].num_targets = targets
            return result

        trainer.training_step = step
        trainer.add_callback(self)

    def _note(self, body: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if body.training and torch.is_grad_enabled():
            given = dict(zip(("input_ids", "pixel_values"), args, strict=False)) | kwargs
            self.pending.append(MicroBatch({n: given[n].clone() for n in INPUTS if given.get(n) is not None}))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.gradients.append(
            {n: whole(p.grad).clone() / self.scale for n, p in model.named_parameters() if p.grad is not None}
        )
        self.steps.batches.append(self.pending)
        self.pending = []


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapter = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["router"],
    )
    wrapped = get_peft_model(model, adapter)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def set_coefficients(model: Any, coefficients: tuple[float, float]) -> None:
    config = find_body(model).config
    for moe in (config.moe(part) for part in PARTS):
        if moe is not None:
            moe.router_aux_loss_coef, moe.router_z_loss_coef = coefficients


@cache
def base() -> tempfile.TemporaryDirectory:
    """A folder with the tiny model (DPO reads its reference from where the model came from)."""
    folder = tempfile.TemporaryDirectory()
    models.sparse_model(image_token_id=processor().image_token_id).save_pretrained(folder.name)
    return folder


def wrapped_layers(model: Any) -> list[str]:
    """The modules that the host's FSDP2 has taken over."""
    return [name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")]


def make_model() -> Any:
    return VLMoEForConditionalGeneration.from_pretrained(base().name)


def train(
    name: str,
    setting: Setting,
    coefficients: tuple[float, float],
    model: Any = None,
    helped: bool = True,
    reads: Any = None,
) -> tuple[Any, Steps]:
    """Runs two optimizer steps that move nothing (the learning rate is zero)."""
    set_seed(0)
    model = model if model is not None else make_model()
    model = with_lora(model) if setting.has_lora else model
    fields = {"per_device_train_batch_size": ROWS_PER_BATCH, "max_steps": 2} | setting.fields
    if KINDS[name].config.__name__ == "GRPOConfig":
        fields["loss_type"] = "grpo"
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, model, reads or processor(), folder, ROWS * world_size(), **fields)
        set_coefficients(trainer.model, coefficients)
        recorder = Recorder(trainer, SCALE if setting.has_scaler else 1.0)
        if setting.has_scaler:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        if KINDS[name].needs_help and helped:
            follow_trainer(trainer)
        trainer.train()
        unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    return unwrapped, recorder.steps


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def norm(gradients: dict[str, Tensor]) -> float:
    return sum(g.double().square().sum().item() for g in gradients.values()) ** 0.5


def relative_gap(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted|, over all parameters together."""
    names = found.keys() | wanted.keys()
    zero = torch.zeros(())
    return norm({n: found.get(n, zero) - wanted.get(n, zero) for n in names}) / norm(wanted)


def plain(name: str) -> str:
    """A parameter's name without what wrappers add."""
    return name.removeprefix("module.")


@dataclass
class Cell:
    """What was measured: the largest gap over the steps, and the smallest sizes of both gradients."""

    gap: float
    task: float
    auxiliary: float


def whole_targets(step: list[MicroBatch], counts: bool) -> int | None:
    """The step's targets over all processes."""
    if not counts:
        return None
    total = torch.tensor(sum(batch.num_targets for batch in step))
    if world_size() > 1:
        dist.all_reduce(total)
    return int(total)


def reduced(gradients: dict[str, Tensor], model: Any, by_targets: bool) -> dict[str, Tensor]:
    """The gradient over all processes: shares of targets add up, shares of micro-batches average."""
    if world_size() == 1:
        return gradients
    found = {}
    for name, parameter in model.named_parameters():
        total = gradients.get(name, torch.zeros_like(parameter)).clone()
        dist.all_reduce(total)
        found[name] = total if by_targets else total / world_size()
    return found


@cache
def train_without(name: str, setting: str) -> Steps:
    """The run with the losses off, of the tiny model on one process."""
    return train(name, SETTINGS[setting], OFF)[1]


def counts_targets(name: str, model: Any) -> bool:
    """Whether a trainer's loss is a mean over the step's targets: some hosts' models say that theirs is a mean over
    each micro-batch's, whatever they are told.
    """
    return KINDS[name].counts_targets and getattr(model, "accepts_loss_kwargs", True)


def measure(
    name: str, setting: str | Setting, loss: str, make: Any = None, alone: Any = None, reads: Any = None
) -> Cell:
    """A trainer's router gradient (with the losses on, less that with them off) against the oracle.

    Args:
        name: the trainer, of `KINDS`.
        setting: how it is run; of `SETTINGS` for the tiny model on one process.
        loss: of `LOSSES`.
        make: makes the model to train; a tiny one where None.
        alone: the same model on this process alone, where the one trained is spread over several.
        reads: the processor of what `make` makes; the tiny model's where None.
    """
    if isinstance(setting, str):
        off = train_without(name, setting)
        model, on = train(name, SETTINGS[setting], LOSSES[loss])
    else:
        _, off = train(name, setting, OFF, make(), reads=reads)
        model, on = train(name, setting, LOSSES[loss], make(), reads=reads)
    judge = alone if alone is not None else model
    counts = counts_targets(name, judge)
    cells = []
    for with_loss, without, step in zip(on.gradients, off.gradients, on.batches, strict=True):
        wanted = oracle_gradients(judge, step, LOSSES[loss], whole_targets(step, counts))
        wanted = reduced(wanted, judge, counts)
        found = {plain(n): g - without[n] for n, g in with_loss.items()}
        found = {n: g for n, g in found.items() if n in wanted or g.any()}
        cells.append(Cell(relative_gap(found, wanted), norm(without), norm(wanted)))
    assert len(cells) == 2, "two optimizer steps were expected"
    return Cell(max(c.gap for c in cells), min(c.task for c in cells), min(c.auxiliary for c in cells))
