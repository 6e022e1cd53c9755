"""What `vlmoe convert-routing` can be told. No torch here: help reads these fields."""

from dataclasses import dataclass, field

from .arguments import option
from .delta_arguments import RewriteArguments, checkpoint_option

KINDS = ("shared", "per_modality_balance", "intra_inter", "isolated")


@dataclass
class ConvertRoutingArguments(RewriteArguments):
    """A vlmoe model in, the same with its LLM routed otherwise by modality out."""

    checkpoint: str | None = checkpoint_option("A vlmoe model, a folder or a Hub id; merge an adapter first.")
    to: str | None = option(f"How image tokens and text tokens are to be routed: {', '.join(KINDS)}.")
    modality_experts: list[int] | None = field(
        default=None,
        metadata={
            "help": "Of intra_inter and isolated, how many experts are of images, of text and of both, like 2 2 4; "
            "not given: a quarter, a quarter and the rest, or halves.",
            "flag": tuple[int, int, int],
        },
    )
    output_dir: str | None = option("Folder of the converted model.")
    revision: str | None = option("Branch, tag or commit of the checkpoint on the Hub.")
    force: bool = option("Replace an output folder that is not empty (only once the new one is complete).", False)
    dry_run: bool = option("Print what would be written, with parameters and bytes; write nothing.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to is not None and self.to not in KINDS:
            raise ValueError(f"--to is {self.to!r}; expected one of {', '.join(KINDS)}.")
        if self.modality_experts is not None:
            self.modality_experts = list(self.modality_experts)
