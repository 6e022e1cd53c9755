"""What `vlmoe upcycle` can be told: one dataclass, filled from flags, from a YAML recipe, or in Python."""

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .part_arguments import read_counts, read_fields


def option(help: str, default: Any = None, flag: type | None = None) -> Any:
    """A field with the help text that the command shows; `flag` is what it reads, where the field takes more types."""
    return field(default=default, metadata={"help": help, "flag": flag})


NATIVE = "native"
FORMATS = ("vlmoe", NATIVE)
STRATEGIES = ("default", "full")
CONTAINERS = re.compile(r"\w+\[[^]]*\]")  # of an annotation: list[int]
# Every second layer of the LLM, however many it has, and the first of them.
EVERY_SECOND = {"even": 0, "odd": 1}
MOST_LAYERS = 10_000  # a layer beyond it is a slip of the keyboard, and a range up to it would fill the memory


def check_strategy(given: str | None) -> None:
    """Checks which tokens the connector is to read.

    Raises:
        ValueError: for another word.
    """
    if given not in (None, *STRATEGIES):
        raise ValueError(f"--vision-feature-select-strategy is {given}; expected {' or '.join(STRATEGIES)}.")


@dataclass
class UpcycleArguments:
    """Dense parents in, sparse vision-language model out. Layers are counted from 0: `0,1,4` or `4-11`."""

    text_model: str | None = option("Dense LLM (or a multimodal model around it): a folder or a Hub id.")
    vision_model: str | None = option("Dense ViT (or a CLIP, SigLIP or VLM around it): a folder or a Hub id.")
    vlm_model: str | None = option("Instead of the two parents: a dense VLM (or vlmoe model), a folder or a Hub id.")
    output_dir: str | None = option("Folder of the sparse model.")
    text_experts: int | None = option(
        "Experts per sparse layer of the LLM; not given: it stays dense, but gets 8 when no part is given any."
    )
    text_top_k: int | None = option("Experts each token of the LLM is sent to; not given: 2.")
    text_layers: str | None = option("Sparse layers of the LLM; `even` or `odd`: every second; not given: all.")
    text_router: str | None = option("Router of the LLM's experts: softmax or sigmoid; not given: softmax.")
    text_moe: dict[str, Any] | str | None = option(  # noqa: RUF009 (it is a field)
        "Any other fields of the LLM's MoEConfig: a mapping in a recipe, `field: value, field: value` as a flag.",
        flag=str,
    )
    vision_experts: int | list[int] | str | None = option(  # noqa: RUF009 (it is a field)
        "Experts per sparse layer of the ViT, one number or one for each, like 4,8,8; not given: the ViT stays dense.",
        flag=str,
    )
    vision_top_k: int | None = option("Experts each token of the ViT is sent to; not given: 2.")
    vision_layers: str | None = option(
        "Sparse layers of the ViT; not given: the upper half of those the connector reads."
    )
    vision_router: str | None = option("Router of the ViT's experts, as of the LLM's; or expert_choice, attention.")
    vision_moe: dict[str, Any] | str | None = option("As --text-moe, of the ViT's.", flag=str)  # noqa: RUF009
    connector_experts: int | None = option("Experts of the connector; not given: it stays dense.")
    dense: bool = option("No part gets experts: a dense model, to be tuned and upcycled by --vlm-model.", False)
    connector_top_k: int | None = option("Experts each image token is sent to in the connector; not given: 2.")
    connector_router: str | None = option("Router of the connector's experts, as of the ViT's.")
    connector_moe: dict[str, Any] | str | None = option("As --text-moe, of the connector's.", flag=str)  # noqa: RUF009
    vision_feature_layer: int | list[int] | None = option(  # noqa: RUF009 (it is a field)
        "Hidden state of the ViT that the connector reads (a recipe may list several); not given: -2, the last "
        "layer's input, or -1 where the ViT merges patches behind its last layer."
    )
    vision_feature_select_strategy: str | None = option(
        "`default` leaves out the tokens before the patches (class token, registers), `full` keeps them; not given: "
        "`default` where there are such."
    )
    expert_init: str = option(
        "How experts are made of the dense MLP: `copy`; or `delta`, one base that all share and pairs of low rank for "
        "each, at about the dense model's size and price.",
        "copy",
    )
    expert_rank: int | None = option("Of `--expert-init delta`: the rank of each expert's pairs; not given: 16.")
    router_init: str = option("How router weights are drawn: uniform.", "uniform")
    seed: int = option("Seed of everything that is drawn.", 0)
    dtype: str | None = option("float32, bfloat16 or float16; not given: the LLM's own.")
    text_revision: str | None = option("Branch, tag or commit of the LLM on the Hub.")
    vision_revision: str | None = option("Branch, tag or commit of the ViT on the Hub.")
    vlm_revision: str | None = option("Branch, tag or commit of the dense VLM on the Hub.")
    format: str = option(
        "`vlmoe`; or `native`: transformers' own classes, LLaVA around a sparse LM (as `vlmoe export`).", "vlmoe"
    )
    force: bool = option("Replace an output folder that is not empty (only once the new one is complete).", False)
    dry_run: bool = option("Print what would be written, with parameters and bytes; write nothing.", False)

    def __post_init__(self) -> None:
        if self.output_dir is not None:
            self.output_dir = str(self.output_dir)
        if self.format not in FORMATS:
            raise ValueError(f"--format is {self.format!r}; expected {' or '.join(FORMATS)}.")
        check_strategy(self.vision_feature_select_strategy)
        for name in ("text_layers", "vision_layers"):
            parse_layers(getattr(self, name), name)
        self.vision_experts = read_counts(self.vision_experts, "vision_experts")
        for name in ("text_moe", "vision_moe", "connector_moe"):
            read_fields(getattr(self, name), name)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str) -> "UpcycleArguments":
        """The arguments from plain values, whose types are checked.

        Raises:
            ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
        """
        return from_values(cls, values, origin)


def from_values(settings: Any, values: dict[str, Any], origin: str) -> Any:
    """A dataclass of settings from plain values, whose types are checked.

    Raises:
        ValueError: for a key that is no field, or a value of another type; `origin` says where it stands.
    """
    known = {item.name: item for item in fields(settings)}
    if unknown := sorted(map(str, set(values) - set(known))):
        raise ValueError(f"{origin} has unknown keys: {', '.join(unknown)}. Known: {', '.join(known)}.")
    for name, value in values.items():
        check_type(name, value, known[name].default, str(known[name].type), origin)
    return settings(**values)


def check_type(name: str, value: Any, default: Any, annotation: Any, origin: str) -> None:
    """Refuses a value that is not of the field's type; None stands for "not given"."""
    if name.endswith("_layers") and isinstance(value, list | int):
        return
    if "list[int]" in annotation and isinstance(value, list) and all(type(item) is int for item in value):
        return
    if "dict[" in annotation and isinstance(value, dict):
        return
    plain = CONTAINERS.sub("", annotation)
    wanted = [kind for kind in (bool, int, float, str) if kind.__name__ in plain]
    is_optional = default is None or default is MISSING
    if (value is None and is_optional) or type(value) in wanted or (float in wanted and type(value) is int):
        return
    expected = " or ".join("yes or no" if kind is bool else kind.__name__ for kind in wanted)
    raise ValueError(f"{origin}: {name} is {value!r}; expected {expected}.")


def parse_layers(given: str | int | Iterable[int] | None, name: str) -> list[int] | None:
    """Reads a choice of layers: `0,1,4`, `4-11`, a list, or None; of `even` and `odd` more than any LLM has.

    Raises:
        ValueError: naming the option, when it is none of these.
    """
    if given is None:
        return None
    if name == "text_layers" and isinstance(given, str) and given in EVERY_SECOND:
        return list(range(EVERY_SECOND[given], MOST_LAYERS, 2))
    if not isinstance(given, str):
        given = ",".join(map(str, [given] if isinstance(given, int) else given))
    layers: list[int] = []
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        is_read = all(end.isdecimal() and len(end) < len(str(MOST_LAYERS)) for end in ends)
        if not is_read or int(ends[0]) > int(ends[1]):
            raise ValueError(
                f"{name} is {given!r}; expected layers counted from 0, like 0,1,4 or 4-11, below {MOST_LAYERS}."
            )
        layers += range(int(ends[0]), int(ends[1]) + 1)
    return layers
