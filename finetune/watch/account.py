"""What was wrong in a run, thing by thing: in the log, in the Trainer's history, and in a file beside the result.

>>> Account(Path("tuned")).tell(Notice("loss not falling", 200, "Loss not falling: ...", {"loss": [5.91, 5.9]}))
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerState

logger = logging.getLogger(__name__)

ALARMS_NAME = "finetune_alarms.json"
ALARM = "alarm"  # the entry in the Trainer's history
NOT_FINITE, STALLED, NO_MEMORY = "not finite", "loss not falling", "out of memory"


@dataclass(frozen=True)
class Notice:
    """One thing that was wrong.

    Attributes:
        kind: NOT_FINITE, STALLED, NO_MEMORY, or a kind of `routing_alarms`.
        step: the optimizer step, counted from 1; None where the run did not say.
        words: what, with the figures, and what to do.
        figures: the figures, by name.
    """

    kind: str
    step: int | None
    words: str
    figures: dict[str, Any] = field(default_factory=dict)


class TrainingFailed(ValueError):
    """A training that cannot go on; its message says why and what to do.

    Attributes:
        notice: the same, for the account.
    """

    def __init__(self, notice: Notice):
        super().__init__(notice.words)
        self.notice = notice


class Account:
    """All that was wrong in a run.

    Args:
        folder: the run's; None keeps no file.

    Attributes:
        notices: in the order of what happened.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.notices: list[Notice] = []

    def take_up(self, state: "TrainerState") -> None:
        """Takes over what a run that is resumed had said before."""
        history: list[dict[str, Any]] = [*state.log_history]
        told = [entry for entry in history if ALARM in entry]
        self.notices = [Notice(one[ALARM], one["step"], one["words"], one["figures"]) for one in told]

    def tell(self, notice: Notice, state: "TrainerState | None" = None) -> None:
        """Notes one thing, in the history too; whoever found it has warned of it or raises it."""
        if any(notice.kind == one.kind and notice.words == one.words for one in self.notices):
            return
        self.notices.append(notice)
        self.write()
        if state is not None:
            told: Any = {
                ALARM: notice.kind,
                "words": notice.words,
                "figures": notice.figures,
                "step": state.global_step,
            }
            state.log_history.append(told)

    def write(self) -> None:
        """Writes the file, whole or not at all; where nothing was wrong there is none."""
        if self.folder is None or not self.folder.is_dir():
            return
        path = self.folder / ALARMS_NAME
        if not self.notices:
            path.unlink(missing_ok=True)
            return
        halfway = path.with_suffix(f".{os.getpid()}.tmp")
        told = [asdict(one) for one in self.notices]
        halfway.write_text(json.dumps({"alarms": told}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        halfway.replace(path)

    @classmethod
    def read(cls, folder: Path) -> "Account":
        """What a run has written; empty where it has written none."""
        account, path = cls(folder), folder / ALARMS_NAME
        if path.is_file():
            account.notices = [Notice(**one) for one in json.loads(path.read_text(encoding="utf-8"))["alarms"]]
        return account

    def listed(self) -> str:
        """One line for the end of a run, and one for each thing."""
        if not self.notices:
            return ""
        several = "s" if len(self.notices) > 1 else ""
        lines = [f"  step {one.step}: {one.words.splitlines()[0]}" for one in self.notices]
        return "\n".join([f"{len(self.notices)} alarm{several} ({ALARMS_NAME}):", *lines])


@contextmanager
def told_in(folder: Path) -> Iterator[None]:
    """Within it a failure that no watch could write down, since memory had run out, is added to a run's account."""
    try:
        yield
    except TrainingFailed as failed:
        if failed.notice.kind == NO_MEMORY:
            Account.read(folder).tell(failed.notice)
        raise
