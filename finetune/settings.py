"""What `vlmoe finetune` can be told beside `TrainingArguments`. No torch here: help reads these fields."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

SETTINGS_NAME = "finetune_settings.yaml"
METHODS: tuple[str, ...] = ("align", "lora")
LORA_PARTS: tuple[str, ...] = ("text", "vision")
LORA_TARGETS: tuple[str, ...] = ("attention", "experts", "mlp")
DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")

# PEFT's own word, which a user may bring along.
ALL_LINEAR = "all-linear"
WHY_NOT_ALL_LINEAR = (
    " PEFT's all-linear finds Linears only: it would miss the experts, which are stacks of weights, and the routers, "
    "and hit layers of the ViT that never get a gradient. lora_targets=attention,experts,mlp, the default, is all "
    "that can learn; train_routers and train_connector add routers and connector."
)


def nearest(words: Iterable[str], known: Iterable[str]) -> str:
    """A hint at the known names nearest to unknown ones."""
    hints = [
        f"{near[0]!r} for {word!r}" for word in words if (near := get_close_matches(str(word), list(known), 1, 0.5))
    ]
    return f" Did you mean {', '.join(hints)}?" if hints else ""


def option(default: Any, help: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class FinetuneSettings:
    """The fields of a recipe that are not `TrainingArguments`'."""

    method: str = option("lora", "align: trains the connector, all else frozen; lora: LoRA in the towers.")
    model: str = option("", "The vlmoe model to tune: a folder or a Hub id.")
    model_revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = option(False, "Whether code that the model's folder or repository carries may run.")
    dtype: str = option("auto", f"The model's dtype while training: {', '.join(DTYPES)} (auto: as saved).")
    experts_implementation: str | None = option(None, "The experts' kernel; not given: transformers' choice.")

    data: str = option(
        "",
        "A JSONL file of rows {messages, images}; a folder of train.jsonl and test.jsonl, or of an imagefolder or "
        "parquet files with a column `messages`; or a Hub id.",
    )
    train_split: str = option("train", "The split of `data` to train on, where it is no single file.")
    eval_data: str | None = option(None, "As `data`, to evaluate on; not given: `eval_split` of `data`.")
    eval_split: str | None = option(
        None, "The split to evaluate on; not given: no evaluation, or `eval_data`'s `test`."
    )
    max_length: int | None = option(
        None, "Longest sample in tokens, image tokens counted; a longer one is an error, since images are never cut."
    )

    lora_parts: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": f"Towers that get LoRA: {', '.join(LORA_PARTS)}."}
    )
    lora_targets: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={
            "help": f"What gets LoRA there: {', '.join(LORA_TARGETS)} (mlp: dense MLPs, where a layer has one)."
        },
    )
    lora_r: int = option(16, "Rank of LoRA; for experts, of each expert.")
    lora_alpha: int = option(32, "LoRA's scale is lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before LoRA, on experts too.")
    train_routers: bool = option(True, "lora: whether the routers of `lora_parts` are trained, whole.")
    train_connector: bool = option(False, "lora: whether the connector is trained, whole, its router and experts too.")
    merge: bool = option(False, "lora: whether the merged model is written too, to OUTPUT_DIR/merged.")

    router_aux_loss_coef: float | None = option(None, "Weight of the balance loss, all parts; not given: the model's.")
    router_z_loss_coef: float | None = option(None, "Weight of the router z-loss, all parts; not given: the model's.")
    log_router_load: bool = option(True, "Whether the experts' load per layer is logged.")
    router_alarms: bool = option(
        True, "Whether log_router_load warns of dead experts, of identical ones, and of saturated routers."
    )
    force: bool = option(False, "Whether an output folder that an earlier run has filled is emptied first.")


def check_lora_words(settings: FinetuneSettings) -> None:
    """Refuses unknown parts and targets.

    Raises:
        ValueError: saying which are known.
    """
    for name, known in (("lora_parts", LORA_PARTS), ("lora_targets", LORA_TARGETS)):
        given = getattr(settings, name)
        words = [given] if isinstance(given, str) else list(given)
        unknown = [word for word in words if word not in known]
        if isinstance(given, str) or not words or unknown:
            hint = WHY_NOT_ALL_LINEAR if ALL_LINEAR in unknown else nearest(unknown, known)
            expected = f"{', '.join(known)}{', as a list' if isinstance(given, str) else ''}"
            raise ValueError(f"{name} is {given!r}; expected some of {expected}.{hint}")
