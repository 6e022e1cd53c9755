"""What `vlmoe data check` can be told. No torch here: help reads these fields."""

from dataclasses import dataclass, field

from ..data_formats.names import AUTO


@dataclass
class DataCheckSettings:
    """A run of `vlmoe data check`.

    Attributes:
        data: sources, as `finetune` reads them.
        model: a model or an adapter, whose processor and chat template rows are laid out and counted by; None: rows
            are looked at without one.
        split: the split of sources that are no single file.
        data_format: the form of the rows; auto: by their columns.
        image_folder: where paths of images are counted from; None: each data's folder.
        question: what captioned and labelled images are asked; None: the form's own.
        max_length: the longest sample, in tokens; None: as long as the model's positions reach.
        max_rows: how many rows of each source are looked at, from the first on; None: all.
        revision: of the model on the Hub.
        trust_remote_code: whether code that the model carries may run.

    Raises:
        ValueError: for settings that do not go together, and numbers below 1.
    """

    data: list[str] = field(default_factory=list)
    model: str | None = None
    split: str = "train"
    data_format: str = AUTO
    image_folder: str | None = None
    question: str | None = None
    max_length: int | None = None
    max_rows: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("There are no DATA to check; name one source or more.")
        for name in ("max_length", "max_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more.")
        if self.model is None and self.max_length is not None:
            raise ValueError("max_length is in tokens, which only a model counts; give --model too, or leave it out.")
