"""What `vlmoe route` can be told. No torch here: help reads these fields."""

from dataclasses import dataclass, field

from ..data_formats.names import AUTO

PAGE, NUMBERS = "index.html", "routing.json"


@dataclass
class RouteSettings:
    """A run of `vlmoe route`.

    Attributes:
        checkpoint: a model of ours, or an adapter's folder.
        data: sources of chat data, as `finetune` reads them.
        output_dir: the folder of page, figures and numbers.
        split: the split of sources that are no single file.
        data_format: the form of their rows, as `finetune` takes it.
        image_folder: where paths of images are counted from; None: each data's folder.
        question: what captioned and labelled images are asked; None: the form's own.
        layer: the layer that is shown first: "17" of the LLM, "vision/3", "connector"; None: the last sparse layer of
            the ViT, else the last of the LLM.
        num_samples: rows of each source that are measured, evenly spaced.
        num_shown: of these, the rows of each source that are shown with their patches and tokens.
        label_field: the column that labels a row; None: the answer.
        batch_size: rows of a pass; models in a class of the host's, which may tile images, take one at a time.
        revision: of the checkpoint on the Hub.
        trust_remote_code: whether code that the checkpoint carries may run.
        force: whether an earlier result in the folder is overwritten.

    Raises:
        ValueError: for numbers below 1.
    """

    checkpoint: str
    data: list[str] = field(default_factory=list)
    output_dir: str = "routing"
    split: str = "test"
    data_format: str = AUTO
    image_folder: str | None = None
    question: str | None = None
    layer: str | None = None
    num_samples: int = 200
    num_shown: int = 6
    label_field: str | None = None
    batch_size: int = 8
    revision: str | None = None
    trust_remote_code: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("num_shown", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} or more.")
        if not self.data:
            raise ValueError("There are no DATA to route; name one source or more behind the checkpoint.")
