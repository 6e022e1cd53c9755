"""By which classes a host's processor and its parts are loaded, where they are loaded beside a sparse model.

transformers goes by the model's type where files do not name a class, and for some types whatever they name
(AutoTokenizer, 5.23). The type of a model that is sparse in place is another, so its folder has to name every class.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from .streaming import read_json

IMAGE, VIDEO = "image_processor", "video_processor"
# Fields that tell the class of an image or video processor, first the one that transformers writes.
IMAGE_CLASS = ("image_processor_type", "feature_extractor_type", "auto_map")
VIDEO_CLASS = "video_processor_type"
PROCESSOR_CLASS, TOKENIZER_CLASS = "processor_class", "tokenizer_class"
# Files that may name the processor's.
NAMING = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, TOKENIZER_CONFIG_FILE)


def values_of(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none."""
    return read_json(file) if file.is_file() else {}


def add_value(file: Path, name: str, value: str) -> None:
    """Sets one field of a file, which may not be there yet."""
    file.write_text(json.dumps(values_of(file) | {name: value}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def named_class(folder: Path) -> str | None:
    """The processor's class that a folder's files name, in the order in which transformers looks; None where none
    does.
    """
    return next((found for name in NAMING if (found := values_of(folder / name).get(PROCESSOR_CLASS))), None)


def processor_class_of(folder: Path, model_type: str | None) -> Any:
    """The class that a folder names as its processor's, else that of the model; None where there is none."""
    name = named_class(folder) or PROCESSOR_MAPPING_NAMES.get(model_type or "")
    return None if name is None else processor_class_from_name(name)


def name_classes(folder: Path, processor: Any, model_type: str) -> None:
    """Names the classes of a processor, its tokenizer and its video processor in a folder whose files do not, or name
    a tokenizer's that transformers does not take for the dense model's type.

    Args:
        folder: Where the files are.
        processor: What was loaded from such files beside the dense model.
        model_type: The dense model's.
    """
    if named_class(folder) is None:
        add_value(folder / PROCESSOR_NAME, PROCESSOR_CLASS, type(processor).__name__)
    tokenizer = getattr(processor, "tokenizer", None)
    file = folder / TOKENIZER_CONFIG_FILE
    if tokenizer is not None and "auto_map" not in (values := values_of(file)):
        wanted = type(tokenizer).__name__
        if str(values.get(TOKENIZER_CLASS)).removesuffix("Fast") != wanted.removesuffix("Fast"):
            add_value(file, TOKENIZER_CLASS, wanted)
    host_class = processor_class_of(folder, model_type)
    if host_class is not None and VIDEO in host_class.get_attributes():
        name_video_class(folder, processor, model_type)


def is_same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two processors' tokenizers split every text alike: by class, and by their rules where they tell them."""
    tokenizers = [getattr(processor, "tokenizer", None) for processor in (one, other)]
    rules = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in tokenizers]
    texts = [None if rule is None else rule.to_str() for rule in rules]
    return type(tokenizers[0]) is type(tokenizers[1]) and texts[0] == texts[1]


def check_image_processor_named(folder: Path, processor: Any) -> None:
    """Refuses a processor whose files do not name the class of their image processor: transformers then goes by the
    model's type, which becomes another.

    Args:
        folder: Where its files are.
        processor: What was loaded from there.

    Raises:
        ValueError: naming the file and the field.
    """
    names = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
    files = {name: read_json(folder / name) for name in names if (folder / name).is_file()}
    inside = files.get(PROCESSOR_NAME, {}).get(IMAGE)
    file, values = (PROCESSOR_NAME, inside) if inside else (IMAGE_PROCESSOR_NAME, files.get(IMAGE_PROCESSOR_NAME))
    if values is None or any(values.get(name) for name in IMAGE_CLASS):
        return
    where = f", under {IMAGE!r}," if inside else ""
    wanted = type(getattr(processor, IMAGE)).__name__.removesuffix("Pil")
    raise ValueError(
        f"{folder / file}{where} has no {IMAGE_CLASS[0]}. transformers goes by the model_type then, and that of the "
        f'sparse model is another. Add "{IMAGE_CLASS[0]}": "{wanted}" to it.'
    )


def own_video_class(model_type: str) -> str | None:
    """The name of the video processor in a model's own folder of transformers; None where there is none.

    The table that AutoVideoProcessor goes by is empty where torchvision is not installed (5.23).
    """
    try:
        module: Any = importlib.import_module(f"transformers.models.{model_type_to_module_name(model_type)}")
    except ImportError:
        return None
    return next((name for name in dir(module) if name.endswith("VideoProcessor")), None)


def name_video_class(folder: Path, processor: Any, model_type: str) -> None:
    """Names the class of the video processor, where transformers goes by the dense model's type: no file has it, and
    none that it knows has the name of the image processor's.
    """
    file = next(
        (folder / name for name in (VIDEO_PROCESSOR_NAME, IMAGE_PROCESSOR_NAME) if (folder / name).is_file()), None
    )
    if file is None or VIDEO in values_of(folder / PROCESSOR_NAME):
        return
    values = values_of(file)
    told = str(values.get(IMAGE_CLASS[0])).replace("ImageProcessor", "VideoProcessor")
    if values.get(VIDEO_CLASS) or "auto_map" in values or hasattr(transformers, told):
        return
    loaded = getattr(processor, VIDEO, None)
    if wanted := own_video_class(model_type) if loaded is None else type(loaded).__name__:
        add_value(file, VIDEO_CLASS, wanted)
