"""A model whose weights are split over processes is gathered while it is written; one process writes."""

from typing import Any

import torch.distributed as dist
from peft import PeftModel
from transformers import Trainer

from ..arguments import FinetuneArguments
from ..checkpoints import MAX_SHARD_SIZE, save_finetuned
from .zero3 import is_zero3


def gathered(trainer: Trainer) -> dict[str, Any] | None:
    """The weights that ZeRO-3 has split, of an adapted model those that are trained; None where it splits none. Every
    process has to ask.
    """
    if not is_zero3(trainer):
        return None
    engine: Any = trainer.model_wrapped
    if isinstance(trainer.model, PeftModel):
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return trainer.accelerator.get_state_dict(engine)


def save_result(trainer: Trainer, processor: Any, args: FinetuneArguments, num_rows: int | None) -> None:
    """Writes what was tuned, as `save_finetuned` does; every process has to call it.

    Args:
        trainer: after training.
        processor: the model's.
        args: the recipe.
        num_rows: rows of the training data, for the history.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    state_dict = gathered(trainer)
    if trainer.is_world_process_zero():
        save_finetuned(model, processor, args.folder, args, num_rows, trainer.state, state_dict)
    elif trainer.is_distributed_loading_by_transformers and not isinstance(model, PeftModel):
        model.save_pretrained(args.folder, max_shard_size=MAX_SHARD_SIZE, is_main_process=False)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # nobody goes on to read what is half-written
