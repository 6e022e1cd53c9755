"""The processor of a VLM that stays in its own class: its files, untouched, and what it makes of pictures and text."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    is_torchvision_available,
)

from modeling_vlmoe.companions import CARRIED
from modeling_vlmoe.finetune.control.settings import CONTROL_NAME
from modeling_vlmoe.finetune.evaluation_file import EVALUATION_NAME
from modeling_vlmoe.finetune.watch.account import ALARMS_NAME
from modeling_vlmoe.model_cards.side_files import EVAL_RESULTS_NAME, TRAINER_STATE_NAME

from .delta_arguments import REWRITE_RECEIPT_NAME
from .host_processor_classes import IMAGE, VIDEO, processor_class_of
from .parents import BROKEN, WANTED_FILES, Parent

# In a parent's folder, but not its processor's; weights and their index are told by their names' ends.
RESULTS = (EVALUATION_NAME, EVAL_RESULTS_NAME, CONTROL_NAME, ALARMS_NAME, TRAINER_STATE_NAME)
OF_RUNS = ("train_results.json", "all_results.json", "checkpoint_files.json")  # the last: finetune/chain
RECEIPTS = (*CARRIED, REWRITE_RECEIPT_NAME)
OTHERS = {CONFIG_NAME, GENERATION_CONFIG_NAME, ADAPTER_CONFIG_NAME, *RECEIPTS, *RESULTS, *OF_RUNS}
WEIGHTS = (".safetensors", ".index.json")
TEMPLATES = "additional_chat_templates"
# What processors call the placeholder of an image in a text, the one that they read first.
PLACEHOLDERS = ("boi_token", "image_token")
QUESTION = "What is in the picture, and which colour does it have?"
NO_VIDEO = "videos are not read: torchvision is not installed"


def processor_files(folder: Path) -> list[Path]:
    """The files of a processor: tokenizer, image and video processors, chat templates."""
    found = {file for pattern in WANTED_FILES for file in folder.glob(pattern) if file.is_file()}
    kept = [file for file in found if file.name not in OTHERS and not file.name.endswith(WEIGHTS)]
    return sorted(kept) + sorted((folder / TEMPLATES).glob("*.jinja"))


def copy_processor(source: Path, target: Path) -> None:
    """Copies a processor's files as they are."""
    if source.resolve() == target.resolve():
        return
    for file in processor_files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def optional(function: Any, name: str) -> Any:
    """A function with None as the default of one of its arguments, where that has none, and of those behind it.

    It is copied, not wrapped: transformers reads the names of a processor's arguments off the code of its `__init__`.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    missing = len(names) - len(defaults) - names.index(name) if name in names else 0
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        (None,) * max(0, missing) + defaults,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def without_videos(processor_class: Any, folder: Path | None = None) -> Any:
    """A processor class that does without its video processor, which transformers cannot even build where torchvision
    is not installed (5.23); images and text are processed by the class's own code.

    Args:
        processor_class: The host's.
        folder: Where it is loaded from: its files are written again as they are, what is not read too.
    """

    def get_attributes(cls):
        return [name for name in processor_class.get_attributes() if name != VIDEO]

    def save_pretrained(self, save_directory, *args, **kwargs):
        if folder is None:
            return processor_class.save_pretrained(self, save_directory, *args, **kwargs)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_processor(folder, Path(save_directory))
        return []

    def __reduce_ex__(self, protocol):
        return _rebuild, (processor_class, folder), self.__dict__

    members = {
        "__init__": optional(processor_class.__init__, VIDEO),
        "get_attributes": classmethod(get_attributes),
        "save_pretrained": save_pretrained,
        "apply_chat_template": ProcessorMixin.apply_chat_template,  # SmolVLM's reads the video processor's settings
        "__reduce_ex__": __reduce_ex__,
        "__module__": processor_class.__module__,
    }
    return type(processor_class.__name__, (processor_class,), members)


def _rebuild(processor_class: Any, folder: Path | None) -> Any:
    made = without_videos(processor_class, folder)
    return made.__new__(made)


def load_processor(folder: Path, given: str, model_type: str | None) -> tuple[Any, str | None]:
    """The processor in a folder, by the class that transformers takes, and what it cannot read here.

    Args:
        folder: Where it is.
        given: What messages call the model.
        model_type: The dense model's; None for a folder that has to name the class itself, as ours have to.

    Raises:
        ValueError: when there is none that can be loaded.
    """
    found = processor_class_of(folder, model_type)
    try:
        parts = [] if found is None else found.get_attributes()
        does_without = {IMAGE, VIDEO} <= set(parts) and not is_torchvision_available()
        loader: Any = without_videos(found, folder) if does_without else (found or AutoProcessor)
        processor = loader.from_pretrained(folder, trust_remote_code=False)
    except (*BROKEN, ImportError) as error:
        raise ValueError(f"{given} has no processor that can be loaded. Add or mend it: {error}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{given} has a {type(processor).__name__} and no processor of images and text; expected the files of "
            f"one beside the weights, {PROCESSOR_NAME} or preprocessor_config.json and a tokenizer's."
        )
    return processor, NO_VIDEO if does_without else None


def open_processor(name: str | Path, model_type: str | None, revision: str | None = None) -> Any:
    """The processor of a model that is sparse in place, in a folder or on the Hub, of which no weights are fetched.

    Args:
        name: The folder or the Hub id.
        model_type: The dense model's; None where it is not known.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: when there is none that can be loaded.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        wanted = [pattern for pattern in WANTED_FILES if not pattern.endswith(WEIGHTS)]
        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(
                f"The processor of model {name} can be had neither from a folder nor from the Hub; check the name. "
                f"{error}"
            ) from error
    return load_processor(folder, f"model {name}", model_type)[0]


def picture_texts(processor: Any, num_pictures: int) -> Iterator[str]:
    """Texts in which so many pictures have their places, in the ways in which processors want to be told."""
    for name in PLACEHOLDERS:
        if isinstance(token := getattr(processor, name, None), str):
            yield f"{token * num_pictures}{QUESTION}"
            yield "\n".join([token] * num_pictures) + f"\n{QUESTION}"
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in range(num_pictures)), {"type": "text", "text": QUESTION}]
        yield processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    yield QUESTION


def process(processor: Any, pictures: list[Image.Image], given: str) -> dict[str, Any]:
    """What a processor makes of pictures and a text.

    Raises:
        ValueError: when it reads them in no way that is known.
    """
    said = "it has no placeholder for images"
    for text in picture_texts(processor, len(pictures)):
        for images in (pictures, [pictures]):  # some want them by sample
            try:
                return dict(processor(text=[text], images=images, return_tensors="pt"))
            except BROKEN as error:
                said = str(error)
    raise ValueError(f"The processor of {given} ({type(processor).__name__}) cannot read pictures. Mend it: {said}")


def from_parent(parent: Parent) -> tuple[Any, str | None]:
    """A parent's processor; see `load_processor`."""
    return load_processor(parent.folder, parent.given, parent.config.model_type)


def process_video(processor: Any, frames: list[Image.Image]) -> dict[str, Any] | None:
    """What a processor makes of a video and a text; None where it has no placeholder for one or cannot read frames."""
    if not isinstance(token := getattr(processor, "video_token", None), str):
        return None
    pixels = np.stack([np.asarray(frame) for frame in frames])
    try:
        return dict(processor(text=[f"{token}{QUESTION}"], videos=[pixels], return_tensors="pt"))
    except BROKEN:
        return None
