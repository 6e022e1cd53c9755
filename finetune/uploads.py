"""What a Trainer's own upload leaves behind: `Trainer(..., args with push_to_hub=True, callbacks=[WholeUploads()])`.

The host's Trainer copies weights and config.json of a checkpoint into `output_dir` and uploads that (transformers
5.23). The processor, given as `processing_class`, is saved there with the code of the whole family, so that others can
load the model; receipt, history and card come by this callback.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_vlmoe.companions import CARD_NAME, HISTORY_NAME, RECEIPT_NAME, is_ours_to_write


class WholeUploads(TrainerCallback):
    """Takes code, receipt, history and card from the checkpoint that is uploaded to where it is uploaded from."""

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The checkpoint is whole; a card that a person has written in `output_dir` stays."""
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        files = [checkpoint / RECEIPT_NAME, checkpoint / HISTORY_NAME, *checkpoint.glob("*.py")]
        if is_ours_to_write(folder / CARD_NAME):
            files.append(checkpoint / CARD_NAME)
        for file in files:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
