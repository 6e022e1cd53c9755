"""What is found out before a push: which of a folder's files make the model, and whether others can load it from them.

Everything else a folder holds (optimizer states, checkpoints, logs, settings with this machine's paths) stays behind.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CHAT_TEMPLATE_DIR,
    CHAT_TEMPLATE_FILE,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
)

from modeling_vlmoe.conversion.delta_arguments import REWRITE_RECEIPT_NAME
from modeling_vlmoe.conversion.host_processor_classes import processor_class_of
from modeling_vlmoe.conversion.host_processors import load_processor
from modeling_vlmoe.conversion.streaming import CheckpointReader, read_json
from modeling_vlmoe.finetune.control.settings import CONTROL_NAME
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME
from modeling_vlmoe.model_cards.licences import read_metadata
from modeling_vlmoe.model_cards.notes import NOTES_NAME

from .companions import CARD_NAME, HISTORY_NAME, RECEIPT_NAME
from .configuration_in_place import BODY
from .configuration_vlmoe import VLMoEConfig
from .modeling_in_place import is_in_place
from .parts_config import AUTO_MAP
from .processing_vlmoe import VLMoEProcessor

LARGEST_FILE = 5 * 10**9
# The processor's files by the names that the host's tokenizers and image processors give them: a wider pattern would
# match a user's own (tokenizer_hf_token.json, secret.model) too.
TEMPLATE_FILES = (CHAT_TEMPLATE_FILE, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)
TEMPLATES = re.compile(rf"{CHAT_TEMPLATE_DIR}/[\w-]+\.jinja")
PROCESSOR_FILES = (
    PROCESSOR_NAME,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    *TEMPLATE_FILES,
)
RECORD_FILES = (RECEIPT_NAME, REWRITE_RECEIPT_NAME, HISTORY_NAME, EVALUATION_NAME, CONTROL_NAME, NOTES_NAME)
LEGAL_FILES = tuple(f"{name}{end}" for name in ("LICENSE", "NOTICE") for end in ("", ".md", ".txt"))
NAMED_FILES = frozenset((*PROCESSOR_FILES, *RECORD_FILES, *LEGAL_FILES, GENERATION_CONFIG_NAME))


@dataclass(frozen=True)
class Pushed:
    """What of a folder is pushed.

    Attributes:
        folder: where it is.
        is_adapter: whether it is an adapter.
        files: paths relative to the folder, without the card.
        left_out: what else the folder holds.
        adapter_config: of an adapter, as it is to be pushed; None for a whole model.
        replaced: the files that are pushed with other bytes than the folder's.
    """

    folder: Path
    is_adapter: bool
    files: list[str]
    left_out: list[str]
    adapter_config: dict[str, Any] | None = None
    replaced: dict[str, bytes] = field(default_factory=dict)


def read_auto_map(folder: Path, name: str) -> dict[str, str]:
    """The classes that a configuration names for the host's Auto classes; of a file that is not there, none."""
    return read_json(folder / name).get("auto_map", {}) if (folder / name).is_file() else {}


def find_code(folder: Path, names: tuple[str, ...]) -> list[str]:
    """The Python files that these configurations' classes live in, and all that those import from beside them.

    Raises:
        ValueError: when one is missing, or a configuration names none.
    """
    needed: set[Path] = set()
    for name in names:
        if not (auto_map := read_auto_map(folder, name)):
            raise ValueError(
                f"{folder / name} has no auto_map, so nobody without the package could load it. Load the model and "
                "the processor with the package and save both again."
            )
        for reference in auto_map.values():
            repo, _, local = reference.rpartition("--")
            if repo:
                raise ValueError(
                    f"{folder / name} takes its code from the repository {repo}, not from beside it. Load it with the "
                    "package (import modeling_vlmoe) and save it again."
                )
            needed.add(folder / f"{local.rpartition('.')[0]}.py")
    for file in sorted(needed):
        check_is_there(file, f"which the auto_map in {folder} names")
        needed |= {Path(path) for path in relative_imports(file)}
    return sorted({path.name for path in needed} | {path.name for path in folder.glob("__init__.py")})


def relative_imports(file: Path) -> list[str]:
    """The files that a file imports from beside it, and they in turn.

    Raises:
        ValueError: when one is missing.
    """
    try:
        return get_relative_import_files(file)
    except FileNotFoundError as error:
        raise ValueError(
            f"{file} imports {error.filename}, which is not there. Save the model with the package again."
        ) from error


def check_is_there(file: Path, why: str) -> None:
    """Refuses a folder that lacks a file."""
    if not file.is_file():
        raise ValueError(f"{file} is not there, {why}. Save the model and the processor with the package again.")


def check_processor_loads(folder: Path) -> None:
    """Loads the processor, as a user of the pushed folder would; of a host's VLM that is sparse in place, the host's.

    Raises:
        ValueError: when it cannot be, or is another kind of processor.
    """
    if holds_host(folder):
        config = folder / CONFIG_NAME  # which an adapter has none of
        load_processor(folder, str(folder), read_json(config)[BODY] if config.is_file() else None)
        return
    check_is_there(folder / PROCESSOR_NAME, "but a vision-language model needs its processor")
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The processor in {folder} cannot be loaded; save the model's own processor there. {error}"
        ) from error
    if not isinstance(processor, VLMoEProcessor):
        raise ValueError(f"{folder / PROCESSOR_NAME} makes a {type(processor).__name__}; expected a VLMoEProcessor.")


def holds_host(folder: Path) -> bool:
    """Whether a folder holds a host's VLM that is sparse in place, or an adapter of one."""
    if (config := folder / CONFIG_NAME).is_file():
        return is_in_place(read_json(config))
    mapping = read_json(folder / ADAPTER_CONFIG_NAME).get("auto_mapping") or {}  # PEFT's, of the model it was made on
    is_ours = mapping.get("base_model_class") in {reference.rpartition(".")[2] for reference in AUTO_MAP.values()}
    found = processor_class_of(folder, None)
    return not is_ours and found is not None and found.__name__ != VLMoEProcessor.__name__


def naming_files(folder: Path, is_adapter: bool) -> tuple[str, ...]:
    """The files that name our code: a host's own processor does not."""
    files = () if is_adapter else (CONFIG_NAME,)
    return files if holds_host(folder) else (*files, PROCESSOR_NAME)


def find_weights(folder: Path) -> list[str]:
    """The model's weight files, each complete and small enough for the Hub.

    Raises:
        ValueError: naming the file.
    """
    files = CheckpointReader(folder).files
    if large := [file for file in files if file.stat().st_size > LARGEST_FILE]:
        raise ValueError(
            f"{large[0]} has {large[0].stat().st_size / 1e9:.1f} GB, but files of a repository stay below "
            f'{LARGEST_FILE / 1e9:.0f} GB. Save the model again: save_pretrained(..., max_shard_size="5GB").'
        )
    is_sharded = len(files) > 1 or files[0].name != "model.safetensors"
    return [file.name for file in files] + ([SAFE_WEIGHTS_INDEX_NAME] if is_sharded else [])


def check_hub_id(name: str, what: str) -> None:
    """Refuses a name that cannot be of a repository.

    Raises:
        ValueError: naming what it was given for.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{what} {name} is no repository's id; expected user/name. {error}") from error


def is_hub_id(name: str) -> bool:
    """Whether a name can be of a repository, and is no folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).is_dir()


def refuse_local_base(folder: Path, base: str | None) -> ValueError:
    """What is said of an adapter whose model others do not have."""
    return ValueError(
        f"The adapter in {folder} belongs to {base or 'a model it does not name'}, which others do not have. Push "
        "that model first (vlmoe push), and give its id here: --base-model user/name."
    )


def check_adapter(folder: Path, base_model: str | None) -> dict[str, Any]:
    """An adapter's configuration as it is to be pushed: with `base_model` in it, where that is given.

    Raises:
        ValueError: when others could not find the model that it belongs to, or a file is missing or broken.
    """
    weights, path = folder / ADAPTER_SAFE_WEIGHTS_NAME, folder / ADAPTER_CONFIG_NAME
    check_is_there(weights, f"but {path} says that the folder holds an adapter")
    try:
        with safe_open(weights, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{weights} is corrupt or truncated; save the adapter again. {error}") from error
    config = read_json(path)
    if base_model is not None:
        check_hub_id(base_model, "--base-model")
        return config | {"base_model_name_or_path": base_model, "revision": None}
    base = config.get("base_model_name_or_path") or ""
    if not is_hub_id(base):
        raise refuse_local_base(folder, base)
    return config


def check_model(folder: Path) -> list[str]:
    """A whole model's files.

    Raises:
        ValueError: when it is not ours, or not whole.
    """
    if (found := read_json(folder / CONFIG_NAME).get("model_type")) != VLMoEConfig.model_type:
        raise ValueError(f"{folder} holds a {found} model; expected a {VLMoEConfig.model_type} one.")
    return [CONFIG_NAME, *find_weights(folder)]


def check_folder(given: str | Path, base_model: str | None = None) -> Pushed:
    """Finds what of a folder is to be pushed; the folder is only read.

    Args:
        given: the folder.
        base_model: for an adapter: the Hub id of its model.

    Raises:
        ValueError: when what would be pushed could not be loaded.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(f"There is no folder {given}; give the folder of a model or of an adapter.")
    is_adapter = (folder / ADAPTER_CONFIG_NAME).is_file()
    if not is_adapter and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_NAME} and no {ADAPTER_CONFIG_NAME}; expected the folder of a model or of an "
            "adapter."
        )
    if base_model is not None and not is_adapter:
        raise ValueError(f"--base-model is given, but {folder} holds a whole model, not an adapter; leave it out.")
    adapter_config, replaced = None, {}
    if is_adapter:
        adapter_config = check_adapter(folder, base_model)
        files = [ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME]
        if base_model is not None:
            replaced = {ADAPTER_CONFIG_NAME: json.dumps(adapter_config, indent=2, sort_keys=True).encode()}
    else:
        files = check_model(folder)
    check_processor_loads(folder)
    files += find_code(folder, naming_files(folder, is_adapter))
    held = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    files = sorted({*files, *(name for name in held if name in NAMED_FILES or TEMPLATES.fullmatch(name))})
    rest = {name.partition("/")[0] + "/" * ("/" in name) for name in held if name not in (*files, CARD_NAME)}
    return Pushed(folder, is_adapter, files, sorted(rest), adapter_config, replaced)


def check_card(text: str, path: Path) -> None:
    """Checks the metadata of a card that a person has edited.

    Raises:
        ValueError: saying what the Hub would refuse, or what names this machine's folders.
    """
    metadata: dict[str, Any] = read_metadata(text)
    if not metadata and REGEX_YAML_BLOCK.search(text):
        raise ValueError(f"The metadata of {path}, between its two lines of ---, is no YAML mapping. Mend it.")
    for base in as_list(metadata.get("base_model")):
        if is_path(base):
            raise ValueError(f"{path}: base_model {base} is a path of this machine; expected the id of a repository.")
        check_hub_id(base, f"{path}: base_model")
    for tag in as_list(metadata.get("tags")):
        if is_path(tag.rpartition(":")[2]):  # PEFT writes base_model:adapter: and where the model was loaded from
            raise ValueError(
                f"{path}: the tag {tag} has a path of this machine; remove it, or write the Hub id there."
            )


def as_list(value: Any) -> list[str]:
    """A metadata value that may be one or several."""
    return [str(one) for one in (value if isinstance(value, list) else [value] if value else [])]


def is_path(name: str) -> bool:
    """Whether a name can only be a path of this machine."""
    return Path(name).is_absolute() or name.startswith((".", "~"))
