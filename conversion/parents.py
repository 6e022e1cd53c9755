"""Finding the dense parents: a folder or a Hub id becomes a configuration and an open checkpoint."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from modeling_vlmoe.configuration_vlmoe import VLMoEConfig
from modeling_vlmoe.moe_config import PARTS, sparse_fields

from .arguments import UpcycleArguments
from .host_parents import check_dense_host, is_host
from .llava_parents import check_dense_llava, is_llava
from .streaming import CheckpointReader, read_json

WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
COMMIT = re.compile(r"[0-9a-f]{40}")
# What the host raises on a broken file: whatever the first line that stumbles over it raises.
BROKEN = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Parent:
    """One dense parent.

    Attributes:
        role: What it is taken for: `text`, `vision` or `vlm`.
        given: What the user called it.
        folder: Where its files are.
        revision: Its commit, when it comes from the Hub.
        config: Its own configuration; for a tower inside a whole CLIP, LLaVA or Gemma-3, that of the whole.
        reader: Its tensors.
    """

    role: str
    given: str
    folder: Path
    revision: str | None
    config: PreTrainedConfig
    reader: CheckpointReader

    @property
    def tower_config(self) -> PreTrainedConfig:
        """The configuration of the tower itself."""
        if self.role == "vision":
            return getattr(self.config, "vision_config", None) or self.config
        return self.config.get_text_config() if self.role == "text" else self.config

    @property
    def is_inside(self) -> bool:
        """Whether the tower is a part of what was saved."""
        return self.tower_config is not self.config


def find_folder(given: str, role: str, revision: str | None = None, flag: str | None = None) -> Path:
    """The folder of a parent: itself, or a snapshot in the Hub's cache (downloaded where there is a network).

    Args:
        given: What the user called it.
        role: The parent's role.
        revision: Branch, tag or commit on the Hub.
        flag: What messages call it, where its revision is `--revision`; None: the options of its role.

    Raises:
        ValueError: when it is neither.
    """
    revision_flag = f"--{role}-revision" if flag is None else "--revision"
    flag = flag or f"--{role}-model"
    path = Path(given).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"{revision_flag} {revision} is given, but {given} is a folder; revisions are of Hub ids. "
                "Leave it out."
            )
        return path
    if path.exists():
        raise ValueError(f"{flag} {given} is a file; expected a folder or a Hub id.")
    try:
        return Path(
            snapshot_download(
                given, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=["*/*.safetensors"]
            )
        )
    except HFValidationError as error:
        raise ValueError(f"{flag} {given}: there is no such folder, and it is no Hub id. Check the path.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{flag} {given} is neither a folder nor in the local Hub cache, and it cannot be fetched from "
            f"the Hub (offline, private, or no such id): {str(error).splitlines()[0]} Check the name, "
            "or download it where there is a network."
        ) from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a folder.

    Raises:
        ValueError: when it is missing, an adapter's, broken, of a type transformers does not know, or quantised.
    """
    file = folder / CONFIG_NAME
    if not file.is_file() and (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(
            f"{folder} is an adapter of PEFT, without the model. Merge it into its model first, and give that one: "
            "PeftModel.merge_and_unload(), then save_pretrained()."
        )
    if "model_type" not in read_json(file):
        raise ValueError(f"{file} names no model_type. Give the folder of a transformers model.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*BROKEN, StrictDataclassError) as error:
        raise ValueError(f"{file} is no configuration that transformers reads. Mend this: {error}") from error
    if config.model_type != VLMoEConfig.model_type:
        forget_code(config)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantised; upcycling needs the full-precision parent. Give that one.")
    return config


def forget_code(config: PreTrainedConfig) -> None:
    """Drops references to a parent's own Python: it is never run, and the written folder will not have it."""
    for one in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        getattr(one, "__dict__", {}).pop("auto_map", None)


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache; None for another folder."""
    name = folder.resolve().name
    return name if folder.resolve().parent.name == "snapshots" and COMMIT.fullmatch(name) else None


def open_parent(given: str, role: str, revision: str | None = None) -> Parent:
    """Opens one parent, and refuses what cannot be one of its role.

    Raises:
        ValueError: saying what is wrong with it.
    """
    folder = find_folder(given, role, revision)
    config = read_config(folder)
    CHECKS[role](given, config)
    return Parent(role, given, folder, commit_of(folder), config, CheckpointReader(folder))


def check_text(given: str, config: PreTrainedConfig) -> None:
    """A text parent is a dense causal LM, or has one inside."""
    if config.model_type == VLMoEConfig.model_type:
        raise ValueError(f"--text-model {given} is a vlmoe model; give a dense one as --vlm-model.")
    text = config.get_text_config()
    where = f"its {text.model_type} configuration" if text is config else f"its LLM's {text.model_type} configuration"
    if declared := sparse_fields(text):
        raise ValueError(
            f"--text-model {given} is already sparse: {where} has {', '.join(declared)}. "
            "Only dense LLMs are upcycled: give one, or keep its own experts: `vlmoe import --text-model ...`."
        )
    if text.is_encoder_decoder:
        raise ValueError(
            f"--text-model {given} is a {text.model_type} model, a decoder with an encoder (is_encoder_decoder). "
            "Expected a causal LLM without one; choose another."
        )
    if text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if text.model_type not in MODEL_MAPPING_NAMES:
            raise ValueError(
                f"--text-model {given} is a {text.model_type} model, which transformers registers with a head only "
                "(AutoModelForCausalLM) and not without (AutoModel). Expected an LLM that has both; choose another."
            )
        return
    if text is config:
        raise ValueError(f"--text-model {given} is a {config.model_type} model, which is not a causal LLM. Give one.")
    raise ValueError(
        f"--text-model {given} is a {config.model_type} model; transformers has no causal LM of its own for the "
        f"{text.model_type} inside (its LLM may need what only the whole model knows, such as positions of images). "
        "Expected a causal LLM, or a multimodal model around one, such as Gemma-3, Mistral-3, Qwen3.5 or LLaVA."
    )


def check_vision(given: str, config: PreTrainedConfig) -> None:
    """A vision parent is a ViT, or has one inside."""
    vision = getattr(config, "vision_config", None) or config
    if not hasattr(vision, "patch_size") or not hasattr(vision, "num_hidden_layers"):
        raise ValueError(
            f"--vision-model {given} is a {config.model_type} model, which is not a ViT. "
            "Give one, or a CLIP, SigLIP or vision-language model around it."
        )
    if vision.model_type not in MODEL_MAPPING_NAMES:
        raise ValueError(
            f"--vision-model {given} has a {vision.model_type} inside, for which transformers has no class of its "
            "own. Give another ViT, or a model around one, such as CLIP, SigLIP, LLaVA or Qwen2.5-VL."
        )


def check_vlm(given: str, config: PreTrainedConfig) -> None:
    """A vision-language parent is a vlmoe model, a LLaVA or another VLM of transformers, dense in every part."""
    if is_llava(config):
        check_dense_llava(given, config)
        return
    if is_host(config):
        check_dense_host(given, config)
        return
    if config.model_type != VLMoEConfig.model_type:
        raise ValueError(
            f"--vlm-model {given} is a {config.model_type} model; expected a dense VLM that transformers registers "
            "for image-text-to-text (`vlmoe backbones` lists them). A tower of its own is taken by --text-model or "
            "--vision-model, with a new connector."
        )
    for part in PARTS:
        if (moe := config.moe(part)) is not None:
            raise ValueError(
                f"--vlm-model {given}: its {part} part is already sparse ({moe.num_experts} experts). "
                "Give the dense model it was made of."
            )


CHECKS = {"text": check_text, "vision": check_vision, "vlm": check_vlm}


def is_on_hub(parent: Parent) -> bool:
    """Whether a parent was named by its Hub id, and not by a folder."""
    return parent.revision is not None and not Path(parent.given).expanduser().is_dir()


def open_parents(args: UpcycleArguments) -> dict[str, Parent]:
    """Opens the parents that the arguments name: `text` and `vision`, or `vlm`.

    Raises:
        ValueError: when they are not named as one of these.
    """
    given = {role: getattr(args, f"{role}_model") for role in CHECKS}
    named = {role for role, name in given.items() if name is not None}
    if named not in ({"text", "vision"}, {"vlm"}):
        raise ValueError(
            "Give --text-model and --vision-model, or --vlm-model alone; "
            f"given: {', '.join(f'--{role}-model' for role in CHECKS if role in named) or 'none'}."
        )
    revisions = {role: getattr(args, f"{role}_revision") for role in CHECKS}
    if lone := [role for role in CHECKS if revisions[role] is not None and role not in named]:
        raise ValueError(
            f"--{lone[0]}-revision {revisions[lone[0]]} is given, but no --{lone[0]}-model. Leave it out, or give the "
            f"revision of what is given: {', '.join(f'--{role}-revision' for role in CHECKS if role in named)}."
        )
    return {role: open_parent(given[role], role, revisions[role]) for role in CHECKS if role in named}
