"""What `vlmoe evaluate` can be told. No torch here: help reads these fields."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from ..data_formats.names import AUTO

RESULTS, PREDICTIONS, MARKDOWN, LATEX = "results.json", "predictions.jsonl", "table.md", "table.tex"
OURS = (RESULTS, PREDICTIONS, MARKDOWN, LATEX)
SUITES = ("llava",)
# Their table is `tasks.TASKS`, which imports what scores them.
TASK_NAMES = ("vqa", "caption", "yes-no", "anls", "multiple-choice")
# What says how rows of chat data are read, and its flag; a suite reads its own files.
OF_ROWS = {
    "split": "--split",
    "data_format": "--format",
    "image_folder": "--image-folder",
    "question": "--question",
    "answers": "--answers",
    "by": "--by",
}


def same_checkpoint(checkpoint: str) -> str:
    """A checkpoint's name, the same for every way to write one folder's path."""
    path = Path(checkpoint).expanduser()
    return str(path.resolve()) if path.exists() else checkpoint


@dataclass
class EvaluateSettings:
    """A run of `vlmoe evaluate`.

    Attributes:
        checkpoint: a model of ours, or an adapter's folder.
        task: one of `TASK_NAMES`; None with a suite.
        data: a source of chat data, as `finetune` reads it, for a task; or several, which `data_source` tells apart.
        suite: a set of public benchmarks; None with a task.
        data_dir: the folder of their files.
        output_dir: the folder of results, predictions and tables.
        split: the split of a source that is no single file.
        data_format: the form of its rows, as `finetune` takes it.
        image_folder: where paths of images are counted from; None: the data's folder.
        question: what captioned and labelled images are asked; None: the form's own.
        answers: the field of every row's answers; None: `answers` where a row has it, else what the assistant says
            last.
        by: the field that rows are grouped by.
        also: the same training under other seeds.
        control: what it is compared with: one checkpoint, or one for each.
        shuffle_images: whether it is also asked with other rows' images.
        num_samples: how often rows are drawn again for the spread.
        seed: of that drawing and of the shuffling.
        batch_size: questions of a batch.
        max_new_tokens: of an answer; None: the task's.
        limit: at most so many rows, evenly spaced; None: all.
        card: whether the result is written into the checkpoint's folder and its card.
        revision: of the checkpoint on the Hub.
        trust_remote_code: whether code that a checkpoint carries may run.
        force: whether an earlier result in the folder is overwritten.

    Raises:
        ValueError: for settings that do not go together, and numbers that are too small.
    """

    checkpoint: str
    task: str | None = None
    data: str | list[str] | None = None
    suite: str | None = None
    data_dir: str | None = None
    output_dir: str = "evaluation"
    split: str = "test"
    data_format: str = AUTO
    image_folder: str | None = None
    question: str | None = None
    answers: str | None = None
    by: str | None = None
    also: list[str] = field(default_factory=list)
    control: list[str] = field(default_factory=list)
    shuffle_images: bool = False
    num_samples: int = 1000
    seed: int = 0
    batch_size: int = 8
    max_new_tokens: int | None = None
    limit: int | None = None
    card: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("batch_size", 1), ("max_new_tokens", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more.")
        self._check_what()
        if len(self.control) not in (0, 1, 1 + len(self.also)):
            raise ValueError(
                f"There are {len(self.control)} controls for {1 + len(self.also)} checkpoints; give one control, or "
                "one for each."
            )
        if self.card and (self.also or self.suite):
            raise ValueError(
                "card writes what one checkpoint reaches on one data into its folder; leave out also and suite."
            )
        names = [same_checkpoint(one) for one in self.checkpoints]
        if twice := [one for place, one in enumerate(self.checkpoints) if names[place] in names[:place]]:
            raise ValueError(
                f"The checkpoint {twice[0]} is given twice, which shows no spread over checkpoints; give another "
                "seed's to --also, or leave it out."
            )

    def _check_what(self) -> None:
        """Refuses anything but one task with its data, or one suite with its files."""
        if (self.task is None) == (self.suite is None):
            raise ValueError(
                f"What is to be measured is {'not said' if self.task is None else 'said twice'}; give a TASK "
                f"({', '.join(TASK_NAMES)}), or --suite {SUITES[0]}."
            )
        if self.task is not None:
            if self.task not in TASK_NAMES:
                raise ValueError(f"There is no task {self.task!r}; choose one of {', '.join(TASK_NAMES)}.")
            if self.data is None or self.data_dir is not None:
                raise ValueError(f"The task {self.task} is measured on rows of chat data; name them by --data alone.")
            return
        if self.suite not in SUITES:
            raise ValueError(f"There is no suite {self.suite!r}; choose one of {', '.join(SUITES)}.")
        if self.data_dir is None or self.data is not None:
            raise ValueError(f"The suite {self.suite} is read from its files; name their folder by --data-dir alone.")
        defaults = {item.name: item.default for item in fields(self)}
        if given := [flag for name, flag in OF_ROWS.items() if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"The suite {self.suite} reads, asks and groups its questions as their makers do, from their own "
                f"files; leave out {', '.join(given)}."
            )

    def revision_of(self, checkpoint: str) -> str | None:
        """The revision of one of the checkpoints: what is asked for is the first one's alone."""
        return self.revision if checkpoint == self.checkpoint else None

    @property
    def checkpoints(self) -> list[str]:
        """All checkpoints that are measured, the controls apart."""
        return [self.checkpoint, *self.also]
