"""What `vlmoe finetune` can be told beside `TrainingArguments`. No torch here: help reads these fields."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from .data_formats.names import AUTO, CAPTION_QUESTION, LABEL_QUESTION, LOOKS
from .trained.names import KINDS, PRESETS, TOWERS

SETTINGS_NAME = "finetune_settings.yaml"
METHODS: tuple[str, ...] = ("align", "lora", "delta", "full")
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


# The methods that a setting says something to, where that is not all of them; "_" stands for all that begin so.
OF_METHODS: dict[str, tuple[str, ...]] = {
    "lora_": ("lora",),
    "train_routers": ("lora",),
    "train_connector": ("lora",),
    "quantize_bits": ("lora",),
    "merge": ("lora",),
    "train": ("full", "lora"),
}


def is_heard(name: str, method: str) -> bool:
    """Whether a setting says something where the method is this one."""
    begins = (prefix for prefix in OF_METHODS if prefix.endswith("_") and name.startswith(prefix))
    return method in OF_METHODS.get(name if name in OF_METHODS else next(begins, ""), METHODS)


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

    method: str = option(
        "lora",
        "align: trains the connector, all else frozen; lora: LoRA in the towers; delta: what delta experts have of "
        "their own, routers and connector, whole; full: all weights, or what `train` names.",
    )
    train: list[str] | None = field(
        default=None,
        metadata={
            "help": "full: what is trained, all where nothing is named; lora: what is trained whole beside LoRA. "
            f"Names of the LLM's parts ({', '.join(KINDS)}), of the ViT's and the connector's with vision. or "
            f"connector. before them, of towers ({', '.join(TOWERS)}) or of several ({', '.join(PRESETS)}); or "
            "patterns on parameters' names (model.language_model.layers.3.*)."
        },
    )
    learning_rates: dict | str | None = field(
        default=None,
        metadata={
            "help": "Learning rates of parts, by the names of `train`: {routers: 0.001, vision: 2.0e-6}; of all else "
            "learning_rate."
        },
    )
    weight_decays: dict | str | None = field(
        default=None, metadata={"help": "Weight decays of parts, in the same form; of all else weight_decay."}
    )
    warmups: dict | str | None = field(
        default=None,
        metadata={
            "help": "Warm-ups of parts, in the same form: steps, or below 1 a share of all steps; of all else "
            "warmup_steps."
        },
    )
    model: str = option("", "The vlmoe model to tune: a folder or a Hub id.")
    model_revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = option(False, "Whether code that the model's folder or repository carries may run.")
    dtype: str = option("auto", f"The model's dtype while training: {', '.join(DTYPES)} (auto: as saved).")
    experts_implementation: str | None = option(None, "The experts' kernel; not given: transformers' choice.")
    quantize_bits: int | None = option(
        None, "lora: 4 or 8 loads the LLM, its experts too, in as many bits, for LoRA on top."
    )

    data: str | list[str] = field(
        default="",
        metadata={
            "help": "A file of rows (.jsonl, .json, .parquet, .tar); a folder of train.jsonl and test.jsonl, of tars, "
            "of an imagefolder or of parquet files; or a Hub id. Several are mixed. `vlmoe data check` says what is "
            "wrong."
        },
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Of several data: how often a row is drawn from each; not given: every row once a pass."},
    )
    data_format: str = option(
        AUTO, f"The form of the rows (auto: by their columns): {'; '.join(f'{k}: {v}' for k, v in LOOKS.items())}."
    )
    image_folder: str | None = option(
        None, "The folder that paths of images are counted from; not given: the data file's own."
    )
    question: str | None = option(
        None, f"What captioned and labelled images are asked; not given: {CAPTION_QUESTION} or {LABEL_QUESTION}"
    )
    streaming: bool = option(
        False, "Whether rows of `data` are read and checked while training, not before; needs max_steps."
    )
    shuffle_buffer: int = option(1000, "streaming: of how many rows read ahead the next one is drawn.")
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
    watch: bool = option(
        True, "Whether a loss, gradient or weight that is not finite stops the run, with what was wrong first."
    )
    watch_steps: int = option(
        200, "Steps after which a loss that has not fallen, and experts that are copies, are warned of; 0: never."
    )
    fsdp_size: int | None = option(None, "Processes over which FSDP2 splits the model; not given: it is not split.")
    ep_size: int | None = option(None, "Processes over which the experts are split, of those of fsdp_size.")
    schedule_start: int | None = option(None, "The step at which this run begins in a schedule of schedule_steps.")
    schedule_steps: int | None = option(
        None, "The steps of a learning-rate schedule that this run is a part of; not given: it has one of its own."
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
