"""What `vlmoe classify` can be told: one dataclass, from flags or a YAML recipe. No torch here: help reads it."""

from dataclasses import dataclass
from typing import Any

from modeling_vlmoe.conversion.arguments import from_values, option

ROUTERS = ("attention", "softmax")
# Below it, not even one of these makes a model.
LEAST = {
    "experts": 2,
    "top_k": 1,
    "hidden_size": 8,
    "vision_layers": 2,
    "text_layers": 1,
    "dense_epochs": 1,
    "epochs": 1,
    "batch_size": 1,
    "seeds": 1,
}


@dataclass
class ClassifyArguments:
    """Images, texts and labels in; a sparse classifier and its controls out."""

    data: str | None = option(
        "Folder of images: one sub-folder per class, or a metadata.jsonl or metadata.csv that names file_name, text, "
        "label (and task); or both in train/ and test/. Not given: scikit-learn's handwritten digits, asked for three "
        "tasks."
    )
    output_dir: str | None = option("Folder of everything that the command makes.")
    question: str = option("What is asked of an image where no metadata says.", "What is in the image?")
    test_share: float = option("Share of the images that nothing is trained on, where data has no test/.", 0.25)

    experts: int = option("Experts of each sparse layer of the ViT, and of the connector.", 3)
    top_k: int = option("Experts that each image token is sent to.", 2)
    router: str = option("attention: the text routes the image's tokens; softmax: they route themselves.", "attention")
    hidden_size: int = option("Width of ViT and LLM.", 128)
    vision_layers: int = option("Layers of the ViT; all but the lower half are sparse.", 3)
    text_layers: int = option("Layers of the LLM, which stays dense.", 2)
    image_size: int | None = option("Pixels of a side that images are scaled to; not given: 8 for the digits, or 32.")
    patch_size: int | None = option(
        "Pixels of a patch's side; not given: half of the image's for the digits, or a quarter."
    )

    dense_epochs: int = option("Epochs of the dense model that the sparse one is made of.", 4)
    epochs: int = option("Epochs of the sparse model, and of the dense control.", 10)
    batch_size: int = option("Samples per step.", 32)
    learning_rate: float = option("Peak learning rate.", 1e-3)
    gate_learning_rate: float = option("Peak learning rate of the text gates.", 1e-3)
    gate_spread: float = option(
        "Standard deviation of what the text gates read out at first; 0: they start at nothing.", 1.0
    )
    balance: float = option("Weight of the routers' balance loss, over a batch of all tasks.", 0.02)
    expert_noise: float = option("What experts differ by at first, in standard deviations of a weight.", 0.1)
    shift: float = option("How far training images are moved at most, as a share of their side.", 0.125)
    turn: float = option("How far training images are turned at most, in degrees.", 10.0)

    num_images: int | None = option("Of the digits: how many images are taken; not given: all 1797.")
    seeds: int = option("Runs, each with weights and batches of its own; images are split alike in all.", 3)
    seed: int = option("Seed of the first of them.", 0)
    controls: bool = option("Whether the dense control and logistic regression are run too.", True)
    processes: int | None = option("Runs side by side, one thread each; not given: one per core, or 1 with a GPU.")
    force: bool = option("Empty an output folder that an earlier run has filled.", False)

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output-dir is missing; name the folder of everything that the command makes.")
        self.output_dir = str(self.output_dir)
        self.data = None if self.data is None else str(self.data)
        if self.router not in ROUTERS:
            raise ValueError(f"--router is {self.router!r}; expected {' or '.join(ROUTERS)}.")
        if self.data is not None and self.num_images is not None:
            raise ValueError("--num-images is for the digits, but --data is given; leave one of them out.")
        for name, least in LEAST.items():
            self._check(name, getattr(self, name) >= least, f"{least} or more")
        for name in ("image_size", "patch_size", "num_images", "processes"):
            self._check(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        for name in ("learning_rate", "gate_learning_rate"):
            self._check(name, getattr(self, name) > 0, "more than 0")
        for name in ("balance", "expert_noise", "gate_spread", "turn"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        self._check("test_share", 0 < self.test_share < 1, "a share between 0 and 1")
        self._check("shift", 0 <= self.shift < 1, "0 or more, below 1")
        self._check("top_k", self.top_k <= self.experts, f"{self.experts}, the experts, or fewer")

    def _check(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected {expected}.")

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> "ClassifyArguments":
        """The arguments from plain values, whose types are checked.

        Raises:
            ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
        """
        return from_values(cls, values, origin)
