"""A recipe becomes arguments: one flat namespace of our fields and `TrainingArguments`', read by the host's parser.

>>> parse_recipe("lora", ["model=my-vlmoe", "data=qa.jsonl", "output_dir=tuned", "learning_rate=1e-4"])
FinetuneArguments(method='lora', ...)
"""

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.integrations import is_tensorboard_available

from modeling_vlmoe import recipe_files

from .data_formats.checks import check_data_settings, split_sources
from .heard import check_heard
from .recipes import shipped_chains, shipped_recipes
from .settings import DTYPES, METHODS, FinetuneSettings, check_lora_words, is_heard, nearest
from .trained.checks import check_trained
from .trained.schedules import check_warms_up

REQUIRED = ("model", "data", "output_dir")
# Settings that count something, of which there has to be one at least.
COUNTS = (
    "max_length",
    "lora_r",
    "schedule_steps",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
)
# Settings that are a number of 0 or more.
AMOUNTS = ("learning_rate", "weight_decay", "warmup_steps", "router_aux_loss_coef", "router_z_loss_coef")


@dataclass
class FinetuneArguments(FinetuneSettings, TrainingArguments):
    """Everything a fine-tuning run is told; the fields of `FinetuneSettings` and of transformers' `TrainingArguments`.

    Raises:
        ValueError: for values that cannot work, before anything is loaded.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has to stay off: the collator reads the columns `messages` and `images`."}
    )
    recipe: Path | None = field(default=None, init=False)  # the file that these settings were read from
    trained: dict[str, list[int]] | None = field(default=None, init=False)  # of each part: trained, and all numbers
    stage_prefix: str | None = field(default=None, init=False)  # `align.` in a chain of several; None outside of one

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_names is None:
            self.label_names = ["labels"]  # the host looks in the signature of the PEFT wrapper, where there are none
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # the host would warn that there is nothing to pin for
        self._check_choices()
        check_data_settings(self)
        self._check_numbers()
        self._check_schedule()
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns is on, but the collator reads the columns it would remove; leave it out."
            )
        if "tensorboard" in (self.report_to or ()) and not is_tensorboard_available():
            raise ValueError(
                "report_to names tensorboard, which is not installed: pip install 'vlmoe[train]', or report_to=none."
            )
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub is on, but the Trainer's upload would take along settings with paths of this machine. "
                f"Leave it out, and push the result: vlmoe push {self.output_dir} --repo-id user/name."
            )

    def _check_choices(self) -> None:
        """Refuses unknown words."""
        check_lora_words(self)
        for name, known in (("method", METHODS), ("dtype", DTYPES)):
            if (word := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {word!r}; expected one of {', '.join(known)}.{nearest([word], known)}")

        check_trained(self)

    def _check_numbers(self) -> None:
        """Refuses numbers out of range."""
        for name in COUNTS:
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} is {number}; expected 1 or more.")
        for name in AMOUNTS:
            if (amount := getattr(self, name)) is not None and not 0 <= amount < math.inf:
                raise ValueError(f"{name} is {amount}; expected a number of 0 or more.")
        self._check_length()
        if self.watch_steps < 0:
            raise ValueError(f"watch_steps is {self.watch_steps}; expected 0 (never) or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected 0 or more, below 1.")

    def _check_length(self) -> None:
        """Refuses a run of no step."""
        if self.max_steps < -1 or self.max_steps == 0:
            raise ValueError(
                f"max_steps is {self.max_steps}; expected 1 or more, or leave it out and give num_train_epochs."
            )
        if self.max_steps < 1 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs}; expected more than 0, or give max_steps in its place."
            )

    def _check_schedule(self) -> None:
        """Refuses what the learning rate's schedule does not take, by building it around nothing."""
        start, total = self.schedule_start, self.schedule_steps
        if start is not None and (total is None or not 0 <= start < total):
            raise ValueError(
                f"schedule_start is {start}, but schedule_steps is {total}; give schedule_steps, the length of the "
                "whole schedule, and a start from 0 on that is below it."
            )
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, self.lr_scheduler_kwargs)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_kwargs {self.lr_scheduler_kwargs} do not fit lr_scheduler_type "
                f"{_plain(self.lr_scheduler_type)}: {error}. Choose others, or leave them out."
            ) from error
        check_warms_up(self)

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(str(self.output_dir))

    @property
    def hub(self) -> dict[str, Any]:
        """How the model is read: `revision` and `trust_remote_code`, for every `from_pretrained`."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}

    def settings(self) -> dict[str, Any]:
        """The resolved recipe: our fields, and of `TrainingArguments` what differs from its defaults; of what the
        method does not hear, the default.
        """
        own = {
            item.name: _plain(getattr(self, item.name) if is_heard(item.name, self.method) else _default(item))
            for item in fields(FinetuneSettings)
        }
        host = {
            item.name: _plain(getattr(self, item.name)) for item in fields(self) if item.name not in (*own, *_DERIVED)
        }
        host["report_to"] = self.report_to or "none"  # a command line has no word for an empty list
        defaults = {item.name: _plain(_default(item)) for item in fields(self)}
        return own | {name: value for name, value in host.items() if value != defaults[name]}


# What TrainingArguments resolves for itself on the machine that runs.
_DERIVED = (
    "accelerator_config",
    "dataloader_pin_memory",
    "debug",
    "deepspeed_plugin",
    "disable_tqdm",
    "fsdp_config",
    "gradient_checkpointing",  # the old name of activation_checkpointing, which the host fills in
    "gradient_checkpointing_kwargs",
    "hub_token",
    "label_names",
    "local_rank",
    "recipe",
    "stage_prefix",
    "trained",
)


def _default(item: Field) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _plain(value: Any) -> Any:
    """A field's value as YAML can hold it."""
    value = getattr(value, "value", value)
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


class _Parser(HfArgumentParser):
    """The host's parser, whose errors are the caller's to show."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.replace("argument --", "").split("/--")[0] + _after_alias(message))


def _after_alias(message: str) -> str:
    """What argparse says behind the option's names, as in `argument --lora_r/--lora-r: invalid int value: 'x'`."""
    return f":{message.partition(':')[2]}" if "/--" in message else ""


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The settings of a recipe, given by path or by the name of a shipped one.

    Raises:
        ValueError: if there is no such recipe, or it is not a mapping.
    """
    shipped = shipped_recipes() | shipped_chains()
    return recipe_files.read_recipe(
        shipped.get(str(recipe), recipe), f": expected a YAML file, or one of {', '.join(shipped)}"
    )


def read_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """The settings in `key=value` words; values are read as YAML.

    Raises:
        ValueError: for a word that is not of this form.
    """
    values = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"{word!r} is not of the form key=value; give it so.")
        try:
            values[key.removeprefix("--").replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key.removeprefix("--").replace("-", "_")] = value
    return values


def parse_settings(values: dict[str, Any], origin: str = "the settings") -> FinetuneArguments:
    """Arguments from plain values; None leaves a field at its default.

    Raises:
        ValueError: for unknown keys, with the nearest known names, and for values of the wrong type.
    """
    known = {item.name: item for item in fields(FinetuneArguments) if item.init}
    if "stages" in values:
        raise ValueError(f"{origin} has stages, which only `vlmoe finetune` takes; give a recipe of one stage.")
    if unknown := sorted(map(str, set(values) - set(known))):
        raise ValueError(
            f"{origin} has unknown keys: {', '.join(unknown)}."
            + (nearest(unknown, known) or " Known are those of `vlmoe finetune --help` and of TrainingArguments.")
        )
    given = {name: value for name, value in values.items() if value is not None}
    if missing := [name for name in REQUIRED if not given.get(name)]:
        raise ValueError(f"{origin} does not say {', '.join(missing)}; give for example {missing[0]}=...")
    words = []
    for name, value in given.items():
        if value is False and "bool" not in str(known[name].type):
            value = "no"  # YAML reads `eval_strategy: no` as false
        if name == "data" and isinstance(value, str):
            value = split_sources(value)
        elif isinstance(value, str) and ("list[str]" in (kind := str(known[name].type)) or "list[float]" in kind):
            value = [part.strip() for part in value.split(",")]
        words += [f"--{name}", *_words(value)] if isinstance(value, list) else [f"--{name}={_words(value)[0]}"]
    parser = _Parser(cast(Any, FinetuneArguments), allow_abbrev=False)
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _words(value: Any) -> list[str]:
    """A value as command-line words."""
    if isinstance(value, list):
        return [str(part) for part in value]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


def parse_recipe(recipe: str | Path, overrides: Iterable[str] = ()) -> FinetuneArguments:
    """The arguments of a recipe, with `key=value` overrides.

    Args:
        recipe: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` words.

    Raises:
        ValueError: naming the key or the value that is wrong.
    """
    values, given = read_recipe(recipe), read_overrides(overrides)
    args = parse_settings(values | given, f"Recipe {recipe}")
    check_heard(values, given, f"Recipe {recipe}")
    args.recipe = Path(shipped_recipes().get(str(recipe), recipe)).resolve()
    return args
