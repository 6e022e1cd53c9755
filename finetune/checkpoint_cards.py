"""A card, the receipt and the history in every checkpoint that the Trainer writes: each is a model like the result."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_vlmoe.model_cards import write_card

from .arguments import FinetuneArguments
from .checkpoints import tell_of_run


class CheckpointCards(TrainerCallback):
    """Tells, in each checkpoint's folder, what it is.

    Args:
        args: the recipe.
        num_rows: rows of the training data; None: of a stream nobody knows.
    """

    def __init__(self, args: FinetuneArguments, num_rows: int | None):
        self.args = args
        self.num_rows = num_rows

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """The folder is complete, and new: the card in it is PEFT's, or that of the model that is tuned."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tell_of_run(folder, model, self.args, self.num_rows, state)
            write_card(folder, replace=True)
