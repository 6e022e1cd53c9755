"""A chain of stages, run or resumed: `vlmoe finetune moe-llava output_dir=OUT ...`, the same command both times.

>>> chain = parse_chain(read_recipe("moe-llava"), {"output_dir": "tuned", ...}, "Recipe moe-llava")
>>> run_chain(chain)
PosixPath('tuned/5-moe-tune')

Each stage seeds its own numbers, so that a resumed chain comes to what an uninterrupted one comes to, bit for bit.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import Trainer

from modeling_vlmoe.conversion import upcycle
from modeling_vlmoe.weight_fingerprint import fingerprint

from ..train import finetune
from .checks import check_chain
from .processes import is_main, on_main
from .record import FINISHED, RECORD_NAME, Record, describe_stage, write_record
from .resuming import Start, clear, find_start, make_ready
from .stages import Chain, Stage

Adjust = Callable[[Trainer], None]


def check_and_find(chain: Chain) -> Start:
    """Checks a chain as a whole, and finds where it goes on.

    Raises:
        ValueError: for whatever can be known to go wrong.
    """
    start = find_start(chain)
    if start.num_finished < len(chain.stages):
        check_chain(chain, start.num_finished, start.emptied)
    return start


def free_memory() -> None:
    """Gives back what a stage's model and optimizer took, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def begin(chain: Chain, stage: Stage, record: Record, is_resumed: bool) -> None:
    """Writes down that a stage has begun, in an empty place unless it is resumed."""
    if not is_resumed:
        clear(chain.output_dir, stage.folder)
        record.entries.append(describe_stage(chain, stage))
        write_record(chain.output_dir, record)


def finish(chain: Chain, stage: Stage, record: Record) -> None:
    """Writes down that a stage is finished, and after the last one where the result is."""
    entry = record.entries[-1]
    entry.state, entry.weights = FINISHED, fingerprint(stage.result)
    if stage.number == len(chain.stages) and not chain.is_begun_only:
        record.result = entry.result
    write_record(chain.output_dir, record)


def run_stage(
    chain: Chain,
    stage: Stage,
    checkpoint: str | None,
    say: Callable[[str], None] | None,
    adjust: Sequence[Adjust],
) -> None:
    """Trains, or converts in one process while the others wait."""
    if stage.upcycle is not None:
        on_main(lambda: str(upcycle(chain.upcycling(stage))))
        return
    more = {} if checkpoint is None else {"resume_from_checkpoint": checkpoint}
    finetune(chain.arguments(stage, **more), say, adjust)


def describe(stage: Stage, chain: Chain, checkpoint: str | None) -> str:
    """A line on what begins."""
    what = "converting" if stage.upcycle is not None else "training"
    goes_on = f", from {Path(checkpoint).name}" if checkpoint else ""
    return f"stage {stage.number} of {len(chain.stages)}, {stage.name}: {what} into {stage.folder}{goes_on}"


def run_chain(chain: Chain, say: Callable[[str], None] | None = None, adjust: Sequence[Adjust] = ()) -> Path:
    """Runs a chain's stages, or those that are left of it.

    Args:
        chain: parsed.
        say: takes a line per stage, and what `finetune` says.
        adjust: called with each stage's trainer before it trains.

    Returns:
        The folder of the last stage's model.

    Raises:
        ValueError: for whatever the user can mend, before the first stage where it can be known.
    """
    said = say if say is not None and is_main() else None
    start: Start = on_main(lambda: check_and_find(chain))
    if said is not None and start.num_finished:
        names = ", ".join(stage.name for stage in chain.stages[: start.num_finished])
        said(f"finished already, by {chain.output_dir / RECORD_NAME}: {names}")
    record = on_main(lambda: make_ready(chain, start))
    checkpoint = start.checkpoint
    for stage in chain.stages[start.num_finished :]:
        if said is not None:
            said(describe(stage, chain, checkpoint))
        on_main(lambda stage=stage, is_resumed=checkpoint is not None: begin(chain, stage, record, is_resumed))  # type: ignore[misc]
        run_stage(chain, stage, checkpoint, said, adjust)
        on_main(lambda stage=stage: finish(chain, stage, record))  # type: ignore[misc]
        checkpoint = None
        free_memory()
    return chain.result
