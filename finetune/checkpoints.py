"""What a run leaves behind, how it is loaded again, and how an adapter is merged.

`lora` writes an adapter in PEFT's form, every other method a full checkpoint; both with the processor, with the
receipt of the upcycling they started from, where there is one, with the history of the training, and with a card.
"""

import shutil
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainerState
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from modeling_vlmoe.companions import HISTORY_NAME, RECEIPT_NAME
from modeling_vlmoe.conversion import host_processors
from modeling_vlmoe.conversion.parents import BROKEN
from modeling_vlmoe.image_tokens import image_token
from modeling_vlmoe.model_cards import keep_edited_card, write_card
from modeling_vlmoe.model_cards.side_files import EVAL_RESULTS_NAME, check_companions, read_side_file
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.visible_marks import marked_for

from .arguments import FinetuneArguments
from .collator import chats_of
from .evaluation_file import drop_stale_evaluation
from .history import describe_run, write_history, write_runs
from .settings import SETTINGS_NAME

MAX_SHARD_SIZE = "5GB"


def load_base(
    model: str,
    dtype: str = "auto",
    experts_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **given: Any,
) -> PreTrainedModel:
    """The model to tune, through the Auto classes.

    Args:
        model: a folder or a Hub id.
        dtype: as a recipe says it.
        experts_implementation: the experts' kernel; None takes transformers' choice.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether the model's own code may run.
        **given: for `from_pretrained`, such as how weights are packed.

    Raises:
        ValueError: if there is none, it is not a vlmoe model, or a file that a run's story is told from is broken.
    """
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    check_base(load_base_config(model, revision, trust_remote_code), model)
    kernel = given if experts_implementation is None else {"experts_implementation": experts_implementation, **given}
    try:
        base = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, use_safetensors=True, **kernel, **hub)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights of model {model} cannot be read; expected safetensors that are whole. {error}"
        ) from error
    check_companions(base.companions, model)
    return base


def load_base_config(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of the model to tune.

    Raises:
        ValueError: if there is none.
    """
    if Path(model).is_dir() and not (Path(model) / CONFIG_NAME).is_file():
        hint = ""
        if (Path(model) / ADAPTER_CONFIG_NAME).is_file():
            hint = " It holds an adapter: merge it first, and tune the merged model."
        raise ValueError(f"The folder {model} has no {CONFIG_NAME}; expected a model's folder.{hint}")
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"model {model} is neither a folder nor can it be had from the Hub; check the name. {error}"
        ) from error


def check_base(config: Any, model: str) -> None:
    """Refuses other architectures."""
    if config.model_type != "vlmoe":
        raise ValueError(
            f"model {model} is a {config.model_type} model; expected a vlmoe one, as `vlmoe upcycle` writes it."
        )


def load_processor(
    model: str | Path, config: Any, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The model's processor, our own or a host's.

    Raises:
        ValueError: if there is none, it is another model's, or the model is of a kind that is not tuned here.
    """
    check_decoder(str(model), config)
    processor = open_processor(model, config, revision=revision, trust_remote_code=trust_remote_code)
    check_processor(processor, config)
    return processor


def check_decoder(model: str, config: Any) -> None:
    """Refuses a model whose encoder would read the answers, which are laid out behind the questions.

    Raises:
        ValueError: naming the model.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"model {model} has an encoder for the question and a decoder for the answer; conversations are laid out "
            "as one text, so the encoder would read the answers. Give a model whose LLM has no encoder."
        )


def open_processor(name: str | Path, config: Any, **hub: Any) -> Any:
    """The processor in a folder or a repository.

    Args:
        name: where it is.
        config: the configuration of the model that it belongs to.
        **hub: `revision` and `trust_remote_code`.

    Raises:
        ValueError: if there is none that can be loaded.
    """
    if is_in_place(config):
        return marked_for(config, host_processors.open_processor(name, config.body_model_type, hub.get("revision")))
    try:
        return marked_for(config, AutoProcessor.from_pretrained(name, **hub))
    except (*BROKEN, ImportError) as error:
        raise ValueError(
            f"model {name} has no processor that can be loaded; save the one it was converted with beside it. {error}"
        ) from error


def check_processor(processor: Any, config: Any) -> None:
    """Refuses a processor whose image token is not the model's, and one that cannot lay out conversations.

    Raises:
        ValueError: saying what is wrong.
    """
    chats_of(processor)
    token = image_token(config)
    ids = processor.image_token_ids if is_in_place(config) else [getattr(processor, "image_token_id", None)]
    if token not in ids:
        raise ValueError(
            f"The processor's image token is {', '.join(map(str, ids))}, but the model's "
            f"image_token_id is {token}; give the model the processor it was converted with."
        )


def write_settings(folder: Path, args: FinetuneArguments) -> None:
    """Writes the resolved recipe; the file also marks the folder as one that a run of ours has made."""
    settings = yaml.safe_dump(args.settings(), sort_keys=False, allow_unicode=True)
    (folder / SETTINGS_NAME).write_text(settings, encoding="utf-8")


def tell_of_run(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    args: FinetuneArguments,
    num_rows: int | None = None,
    state: TrainerState | None = None,
) -> None:
    """Writes the receipt of the model that was tuned, where it has one, and its history with this run at the end."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if RECEIPT_NAME in base.companions and not (folder / RECEIPT_NAME).exists():
        (folder / RECEIPT_NAME).write_text(base.companions[RECEIPT_NAME], encoding="utf-8")
    write_history(folder, base, describe_run(args.settings(), base, num_rows, state, args.trained))


def save_finetuned(
    model: PreTrainedModel | PeftModel,
    processor: Any,
    folder: str | Path,
    args: FinetuneArguments,
    num_rows: int | None = None,
    state: TrainerState | None = None,
    state_dict: dict[str, Any] | None = None,
) -> Path:
    """Writes the adapter or the full model, the processor, the receipt, the history, the resolved recipe and the card.

    Args:
        model: what was tuned.
        processor: its processor.
        folder: where to.
        args: the recipe.
        num_rows: rows of the training data, for the history.
        state: the Trainer's, for the history.
        state_dict: the weights, where the model does not hold them itself (ZeRO-3).
    """
    given: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with keep_edited_card(folder):
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder), **given)
        else:
            model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE, **given)
        processor.save_pretrained(folder)
        (folder / EVAL_RESULTS_NAME).unlink(missing_ok=True)  # of a run that this one continues
        drop_stale_evaluation(folder)
        tell_of_run(folder, model, args, num_rows, state)
        write_settings(folder, args)
    return folder


def adapter_base(folder: str | Path) -> tuple[str, str | None]:
    """The model that an adapter belongs to, as the adapter names it, and its revision.

    Raises:
        ValueError: if it names none, or a folder that is not there.
    """
    config = PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {folder} does not say which model it belongs to; give base_model.")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"The adapter {folder} belongs to the model {base}, which is not there; give base_model.")
    return base, config.revision


def load_finetuned(
    folder: str | Path, base_model: str | None = None, *, is_trainable: bool = False, **kwargs: Any
) -> tuple[Any, Any]:
    """Loads what `finetune` wrote.

    Args:
        folder: a full checkpoint or an adapter.
        base_model: the adapter's model, where it is not where the adapter says.
        is_trainable: whether an adapter is loaded to be trained further.
        **kwargs: for the model's `from_pretrained`: dtype, experts_implementation, ...

    Returns:
        The model (a `PeftModel` for an adapter), in eval mode unless trainable, and the processor.
    """
    folder = Path(folder)
    kwargs.setdefault("dtype", "auto")
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        whole = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
        return whole, open_processor(folder, whole.config)
    name, revision = (base_model, kwargs.pop("revision", None)) if base_model else adapter_base(folder)
    base = AutoModelForImageTextToText.from_pretrained(name, revision=revision, **kwargs)
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    return model, open_processor(folder, base.config)


def merge_adapter(adapter: str | Path, output_dir: str | Path, base_model: str | None = None, **kwargs: Any) -> Path:
    """Writes the model with an adapter merged into it: a full checkpoint that needs no PEFT.

    Args:
        adapter: the adapter's folder, with its processor.
        output_dir: the folder of the merged model; it has to be empty or new.
        base_model: the adapter's model, where it is not where the adapter says.
        **kwargs: for the model's `from_pretrained`.

    Raises:
        ValueError: if the output folder is not empty, or the adapter's model is not there.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output_dir {output_dir} is not an empty folder; name another.")
    model, processor = load_finetuned(adapter, base_model, **kwargs)
    if not isinstance(model, PeftModel):
        raise ValueError(f"{adapter} holds no adapter, so there is nothing to merge.")
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(output_dir, max_shard_size=MAX_SHARD_SIZE)
    processor.save_pretrained(output_dir)
    for name in (RECEIPT_NAME, HISTORY_NAME, SETTINGS_NAME):
        if (Path(adapter) / name).is_file():
            shutil.copyfile(Path(adapter) / name, output_dir / name)
    if (Path(adapter) / HISTORY_NAME).is_file() and (runs := read_side_file(output_dir, HISTORY_NAME)):
        write_runs(output_dir, runs)
    write_card(output_dir, replace=True)
    return output_dir
