"""What `vlmoe export` and `vlmoe import` can be told. No torch here: help reads these fields."""

from dataclasses import dataclass, field
from typing import Any

from .arguments import check_strategy, from_values, option

NATIVE, LLAVA, TEXT = "native", "llava", "text"
FORMS = (NATIVE, LLAVA, TEXT)


@dataclass
class ExportArguments:
    """A vlmoe checkpoint in, a checkpoint of transformers' own classes out."""

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "A vlmoe model, a folder or a Hub id; or the folder of an adapter.", "is_argument": True},
    )
    to: str = option(
        "`native`: the whole model (our composite as LLaVA with a sparse LM inside, a VLM that is sparse in place as "
        "its sparse sibling); `llava`: our composite as LLaVA; `text`: the LM alone.",
        NATIVE,
    )
    output_dir: str | None = option("Folder of the exported model.")
    revision: str | None = option("Branch, tag or commit of the checkpoint on the Hub.")
    mean_experts: bool = option(
        "With experts in the ViT or the connector that are no longer copies of one another: write their mean. That "
        "is another model; how far it is from this one is measured and printed.",
        False,
    )
    force: bool = option("Replace an output folder that is not empty (only once the new one is complete).", False)
    dry_run: bool = option("Print what would be written, with parameters and bytes; write nothing.", False)

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise ValueError(f"--to is {self.to!r}; expected one of {', '.join(FORMS)}.")
        for name in ("checkpoint", "output_dir"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, str(value))

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> "ExportArguments":
        """The arguments from plain values, whose types are checked.

        Raises:
            ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
        """
        return from_values(cls, values, origin)


@dataclass
class ImportArguments:
    """A sparse LLM and a ViT, or a LLaVA with a sparse LLM, in; a vlmoe model with the same experts out."""

    text_model: str | None = option("Sparse LLM (Mixtral, Qwen2-MoE, Qwen3-MoE): a folder or a Hub id.")
    vision_model: str | None = option("Dense ViT (or a whole CLIP or SigLIP around it): a folder or a Hub id.")
    vlm_model: str | None = option("Instead of the two parents: a LLaVA whose LLM is one of these, or dense.")
    output_dir: str | None = option("Folder of the vlmoe model.")
    vision_feature_layer: int | list[int] | None = option(  # noqa: RUF009 (it is a field)
        "Of two parents: hidden state of the ViT that the connector reads; not given: -2, the last layer's input."
    )
    vision_feature_select_strategy: str | None = option(
        "Of two parents: `default` leaves the class token out, `full` keeps it; not given: `default` where there is "
        "a class token."
    )
    seed: int = option("Of two parents: seed of the connector, which is drawn.", 0)
    dtype: str | None = option("float32, bfloat16 or float16; not given: the LLM's own.")
    text_revision: str | None = option("Branch, tag or commit of the LLM on the Hub.")
    vision_revision: str | None = option("Branch, tag or commit of the ViT on the Hub.")
    vlm_revision: str | None = option("Branch, tag or commit of the LLaVA on the Hub.")
    force: bool = option("Replace an output folder that is not empty (only once the new one is complete).", False)
    dry_run: bool = option("Print what would be written, with parameters and bytes; write nothing.", False)

    def __post_init__(self) -> None:
        if self.output_dir is not None:
            self.output_dir = str(self.output_dir)
        check_strategy(self.vision_feature_select_strategy)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> "ImportArguments":
        """The arguments from plain values, whose types are checked.

        Raises:
            ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
        """
        return from_values(cls, values, origin)
