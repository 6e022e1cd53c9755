"""What memory a training step takes, by part, without the model's weights: the step is run on tensors that have no
numbers, and what they would take is counted.

Counted is what tensors take in a step that is not the first, so that the optimizer has its states: forward and
backward of one batch. Not counted is what a device keeps for itself (`RESERVE`), and what a loader's processes take.

Experts run by the kernels that they have on the device that is planned for; all else as on a CPU. Three
simplifications: all experts get as many tokens; experts of the full kind are taken as no longer alike (while they are
still copies, LoRA on them takes a little less); and weights that a recipe packs (`quantize_bits`) are counted by their
sizes, the step being run with whole ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import Trainer

from .arguments import FinetuneArguments
from .gpus import CPU, GB, Device
from .hollow_models import build_hollow
from .hollow_operations import HollowOperations, planned_for
from .memory_trace import OTHER, MemoryTrace, bytes_of
from .plan_batch import Batch
from .trained.packed_bytes import packing_saves

# What the driver's context and the gaps between tensors take of a GPU.
RESERVE = int(1.0 * GB)
WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, HEAD = "weights", "adapter", "gradients", "optimizer", "logits and loss"
PARTS = (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, OTHER, HEAD)
# A tensor of which the optimizer's states are measured: large enough for those that keep small ones whole (8 bits).
SAMPLE = (128, 128)


@dataclass(frozen=True)
class MemoryPlan:
    """What a step takes.

    Attributes:
        parts: bytes by part at the step's peak: the model's weights; what the recipe adds to them and trains (LoRA,
            copies of routers, connector and deltas); gradients; the optimizer's states; activations, with inputs and
            temporary tensors; logits and loss.
        num_rows: of the batch.
        length: tokens of each row.
        num_trained: numbers that are trained.
    """

    parts: dict[str, int]
    num_rows: int
    length: int
    num_trained: int

    @property
    def peak(self) -> int:
        """All parts together, bytes."""
        return sum(self.parts.values())

    def fits(self, capacity: float) -> bool:
        """Whether a device of so many bytes can run it."""
        return self.peak + RESERVE <= capacity


def optimizer_bytes(args: FinetuneArguments, trained: Sequence[Tensor]) -> int:
    """What the recipe's optimizer keeps for these tensors, by what it keeps for a small one of their dtype.

    Raises:
        ValueError: if the optimizer is not installed, or cannot be built for one tensor.
    """
    per_number = {}
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        for dtype in {tensor.dtype for tensor in trained}:
            sample = nn.Parameter(torch.zeros(SAMPLE, dtype=dtype))
            sample.grad = torch.zeros_like(sample)
            optimizer = kind([sample], **options)
            optimizer.step()
            states = [one for one in optimizer.state[sample].values() if isinstance(one, Tensor) and one.ndim]
            per_number[dtype] = bytes_of(states) / sample.numel()
    except (ImportError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        name = getattr(args.optim, "value", args.optim)
        why = str(error).rstrip(".")
        raise ValueError(
            f"optim is {name}, which cannot be planned here: {why}. Install what it needs, or choose another, as "
            "adamw_torch, adafactor or sgd."
        ) from error
    return int(sum(per_number[tensor.dtype] * tensor.numel() for tensor in trained))


def run_step(model: nn.Module, batch: Batch, args: FinetuneArguments, num_accumulated: int) -> None:
    """Forward and backward, as the Trainer does them."""
    forward: Any = model
    if args.bf16 or args.fp16:
        autocast = torch.autocast("cpu", dtype=torch.bfloat16 if args.bf16 else torch.float16)
        forward = convert_outputs_to_fp32(autocast(model.forward))
    num_targets = (batch["labels"][:, 1:] >= 0).sum() * num_accumulated
    loss = forward(**batch, num_items_in_batch=num_targets).loss
    loss.backward()


def estimate(config: Any, args: FinetuneArguments, batch: Batch, device: Device = CPU) -> MemoryPlan:
    """What a step of a recipe takes.

    Args:
        config: the model's.
        args: the recipe.
        batch: what the model is given, `labels` too.
        device: what it runs on.

    Raises:
        ValueError: if the recipe does not fit the model, or the model cannot be run without numbers.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model, added = build_hollow(config, args, mode)
    named = dict(model.named_parameters())
    trained = [parameter for parameter in named.values() if parameter.requires_grad]
    num_words = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    trace = MemoryTrace(lambda made: HEAD if made.ndim > 1 and num_words in made.shape else OTHER)
    for name, parameter in named.items():
        trace.hold(parameter, ADAPTER if name in added else WEIGHTS)
    for buffer in model.buffers():
        trace.hold(buffer, WEIGHTS)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda one: trace.hold(one.grad, GRADIENTS))
    for value in batch.values():
        trace.hold(value, OTHER)
    with planned_for(device), trace, HollowOperations():
        if args.gradient_accumulation_steps > 1:  # those of the batches before
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
                trace.hold(parameter.grad, GRADIENTS)
        try:
            run_step(model, batch, args, args.gradient_accumulation_steps)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"The memory of {args.model} cannot be planned: what its forward does depends on numbers that only a "
                f"real pass has ({error}). Try a step with max_steps=1 instead."
            ) from error
    parts = {part: trace.peak_kinds.get(part, 0) for part in PARTS}
    parts[OPTIMIZER] = optimizer_bytes(args, trained)
    if args.quantize_bits is not None:
        saved, unpacked = packing_saves(model, args)
        parts[WEIGHTS] -= saved
        parts[OTHER] += unpacked
    num_rows, length = batch["input_ids"].shape
    return MemoryPlan(parts, num_rows, length, sum(parameter.numel() for parameter in trained))
