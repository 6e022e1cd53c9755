"""Whether a stage that a control is compared with has written down every batch that it was trained on."""

import json
from pathlib import Path

from ..control.seen_batches import SEEN_NAME, covers
from ..history import HISTORY_NAME
from .stages import Chain, Stage
from .whole_checkpoints import step_of


def steps_taken(stage: Stage) -> int:
    """The optimizer steps that a finished stage took."""
    runs = json.loads((stage.folder / HISTORY_NAME).read_text(encoding="utf-8"))
    return int(runs[-1]["steps"])


def why_unseen(chain: Chain, stage: Stage, checkpoint: Path | None = None) -> list[str]:
    """What is missing of the record of a stage's batches, in words; nothing where it is whole, or nobody asks.

    Args:
        chain: its own; `seen_from` says which stages are compared.
        stage: finished, or to be gone on with.
        checkpoint: that it goes on from; None for a finished stage.
    """
    if chain.seen_from is None or stage.number < chain.seen_from or stage.upcycle is not None:
        return []
    num_steps = steps_taken(stage) if checkpoint is None else step_of(checkpoint)
    if covers(stage.folder, num_steps):
        return []
    return [
        f"it was run without a control: no {SEEN_NAME}.jsonl in {stage.folder} has the batches of all its {num_steps} "
        "steps, by which the control is compared"
    ]
