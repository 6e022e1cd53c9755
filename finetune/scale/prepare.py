"""What a run over several processes needs around a trainer, whichever way it is spread."""

from typing import Any

from peft import PeftModel
from transformers import Trainer
from transformers.training_args import ParallelMode

from ..arguments import FinetuneArguments
from .adapted import average_gradients, split_adapted
from .sizes import is_split
from .zero3 import set_leaves


def spread_model(model: Any, args: FinetuneArguments) -> Any:
    """A prepared model, split where that could not be done while it was read; before there is a trainer."""
    if is_split(args) and isinstance(model, PeftModel):
        split_adapted(model, args)
    is_ddp = (
        args.parallel_mode == ParallelMode.DISTRIBUTED
        and not is_split(args)
        and getattr(args, "deepspeed_plugin", None) is None
    )
    if is_ddp and args.ddp_find_unused_parameters is None:
        # A batch without images gives ViT and connector no gradient; the Trainer looks for such only where
        # activations are not checkpointed.
        args.ddp_find_unused_parameters = True
    return model


def spread_trainer(trainer: Trainer, args: FinetuneArguments) -> None:
    """What is set once there is a trainer."""
    if is_split(args) and isinstance(trainer.model, PeftModel):
        average_gradients(trainer)
    set_leaves(trainer)
