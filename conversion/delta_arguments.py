"""What `vlmoe densify` and `vlmoe compress` can be told, and where they tell what they did. No torch here: help reads
these fields.
"""

from dataclasses import dataclass, field
from typing import Any

from .arguments import from_values, option

REWRITE_RECEIPT_NAME = "experts_receipt.json"
CHECKPOINT = "A vlmoe model, a folder or a Hub id; or the folder of an adapter, which is merged first."


def checkpoint_option(help: str = CHECKPOINT) -> Any:
    """The field of the checkpoint, which is named without a flag."""
    return field(default=None, metadata={"help": help, "is_argument": True})


class RewriteArguments:
    """What every command has that reads a checkpoint of ours and writes another."""

    checkpoint: str | None
    output_dir: str | None

    def __post_init__(self) -> None:
        for name in ("checkpoint", "output_dir"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, str(value))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> Any:
        """The arguments from plain values, whose types are checked.

        Raises:
            ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
        """
        return from_values(cls, values, origin)


@dataclass
class DensifyArguments(RewriteArguments):
    """A vlmoe model with delta experts in, the same model with whole experts out."""

    checkpoint: str | None = checkpoint_option()
    output_dir: str | None = option("Folder of the model with whole experts.")
    dtype: str | None = option(
        "float32, bfloat16 or float16; not given: the checkpoint's own. A sum of weights is rounded to it."
    )
    revision: str | None = option("Branch, tag or commit of the checkpoint on the Hub.")
    force: bool = option("Replace an output folder that is not empty (only once the new one is complete).", False)
    dry_run: bool = option("Print what would be written, with parameters and bytes; write nothing.", False)


@dataclass
class CompressArguments(RewriteArguments):
    """A vlmoe model with whole experts in, one with delta experts that is near to it out."""

    checkpoint: str | None = checkpoint_option()
    rank: int | None = option("Rank of each expert's pairs beside the common base.")
    output_dir: str | None = option("Folder of the model with delta experts.")
    seed: int = option("Seed of what is drawn, where an expert needs less than the rank.", 0)
    revision: str | None = option("Branch, tag or commit of the checkpoint on the Hub.")
    force: bool = option("Replace an output folder that is not empty (only once the new one is complete).", False)
    dry_run: bool = option("Print what would be written, with parameters and bytes; write nothing.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"--rank is {self.rank}; expected 1 or more.")
