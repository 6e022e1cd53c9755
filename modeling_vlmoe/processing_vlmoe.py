"""VLMoEProcessor: any image processor and any tokenizer of transformers behind one processor.

The one invariant: an image takes as many places in `input_ids`, each holding `image_token_id`, as the ViT gives
features of it behind its feature selection. Where all images have one size, that number was measured at conversion and
is kept in processor_config.json (`num_image_tokens`); where each has its own, it follows from the size that the image
processor gave it (see image_inputs.py). The host's `ProcessorMixin` does the expansion, the count checks and the
offsets.

Example:
    >>> processor = VLMoEProcessor.from_parents(image_processor, tokenizer, num_image_tokens=576)
    >>> content = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is it?"}]
    >>> messages = [{"role": "user", "content": content}]
    >>> inputs = processor.apply_chat_template(
    ...     messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    ... )
"""

import copy
import logging
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.image_utils import is_valid_image, load_image
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_templates import build_chat_template, default_chat_template
from .image_inputs import count_tokens, form_of_sizes
from .visible_marks import add_visible_marks

logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
MAX_SHOWN = 200  # a base64 string as an image source is megabytes long: errors show its beginning


def _shown(source: Any) -> str:
    text = str(source) if isinstance(source, (str, os.PathLike)) else repr(source)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _load_image(source: Any) -> Any:
    """One image, upright and in RGB where PIL holds it; arrays and tensors pass as they are."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str) and source.startswith("file:"):  # the host reads http(s), data and plain paths
        source = url2pathname(urlsplit(source).path)
    if not isinstance(source, (str, Image.Image)):
        if is_valid_image(source) and source.ndim in (3, 4):
            return source
        raise ValueError(
            f"Not an image: {_shown(source)} of type {type(source).__name__}. Give a PIL image, a path, a URL, a "
            "base64 string, or an array or tensor of shape (channels, height, width) or (height, width, channels)."
        )
    is_path = isinstance(source, str) and not source.startswith(("http://", "https://", "data:"))
    try:
        return load_image(source)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's, on bytes it cannot read
        name = getattr(source, "filename", None) or source
        reason = _shown(error)
        if is_path and not os.path.isfile(str(source)):
            reason = "there is no such file, and it is no base64 string of an image"
        raise ValueError(
            f"Cannot read the image {_shown(name)}: {reason}. Check the path and that the file is a whole image in a "
            "format that PIL reads."
        ) from error


def _load_images(images: Any) -> Any:
    """`_load_image` on every leaf of an image, a list of images, or a list of lists of images."""
    if isinstance(images, (list, tuple)):
        return [_load_images(image) for image in images]
    return _load_image(images)


def _without_none(images: Any) -> Any:
    """Samples' lists of images where None stands for none, as in an Arrow column or in TRL's GRPO trainer (1.16)."""
    if isinstance(images, (list, tuple)) and any(isinstance(sample, (list, tuple)) for sample in images):
        return [[] if sample is None else sample for sample in images]
    return images


def _count_leaves(images: Any) -> int:
    return sum(map(_count_leaves, images)) if isinstance(images, (list, tuple)) else 1


def _drop_none(part: Any) -> Any:
    return {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part


def _default_template(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise ValueError(
            "The tokenizer has neither a chat template nor an EOS token, so that no answer could be closed. "
            "Pass chat_template, or set tokenizer.eos_token."
        )
    has_own_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return default_chat_template(tokenizer.eos_token, tokenizer.bos_token if has_own_bos else "")


def _pick_template(template: str | dict[str, str]) -> str:
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise ValueError(
            f'The tokenizer has several chat templates, {sorted(template)}, and none of them is named "default". '
            "Pass the one to use as chat_template."
        )
    if others := sorted(set(template) - {"default"}):
        logger.warning("Of the tokenizer's named chat templates only the default is kept, not %s.", ", ".join(others))
    return template["default"]


def _copy_model_code(folder: Path) -> None:
    """Copies the model's code where it is beside this file."""
    code = Path(__file__).with_name("modeling_vlmoe.py")
    if code.is_file():  # of a repository that holds a processor alone, the host has fetched no more
        for file in (code, *[Path(name) for name in get_relative_import_files(code)]):
            shutil.copyfile(file, folder / file.name)


def _check_own_id(tokenizer: Any, image_token: str) -> None:
    """A vocabulary with holes makes the tokenizers library (0.22) give a new token an id that is taken."""
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    others = [token for token, id in tokenizer.get_vocab().items() if id == image_token_id and token != image_token]
    if others or tokenizer.convert_ids_to_tokens(image_token_id) != image_token:
        raise ValueError(
            f"The image token {image_token!r} got the id {image_token_id}, which is that of {others} too: the "
            "tokenizer's vocabulary has holes. Give every id below its largest a token, or name an unused token of "
            "the vocabulary as image_token."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_counting(num_image_tokens: Any, image_sizes_name: Any, image_token_side: Any) -> None:
    """It is known how many tokens an image takes, in exactly one way."""
    if image_sizes_name is None:
        if image_token_side is not None:
            raise ValueError(
                f"image_token_side is {image_token_side!r}, but images have no sizes (image_sizes_name is None). Take "
                "both from the checkpoint's processor_config.json."
            )
        if not _is_count(num_image_tokens):
            raise ValueError(
                f"num_image_tokens is {num_image_tokens!r}, but has to be a whole number from 1: the image "
                "features that the vision tower gives per image. Take it from the checkpoint's processor_config.json, "
                "or count the features of one image."
            )
        return
    form_of_sizes(image_sizes_name)
    if num_image_tokens is not None or not _is_count(image_token_side):
        raise ValueError(
            f"image_sizes_name is {image_sizes_name!r}, so images have each their own number of tokens, but "
            f"num_image_tokens is {num_image_tokens!r} (expected None) and image_token_side is {image_token_side!r} "
            "(expected a whole number from 1). Take all three from the checkpoint's processor_config.json."
        )


class VLMoEProcessor(ProcessorMixin):
    """Turns text and images into model inputs: `input_ids`, `attention_mask`, `mm_token_type_ids`, `pixel_values`.

    `input_ids`, `attention_mask` and `mm_token_type_ids` have shape `(batch, sequence)`; the last is 1 on image tokens
    and 0 on text; where a router of the model reads text, 3 on the text that belongs to images (see visible_text.py).
    `pixel_values` has shape `(images, channels, height, width)`, the images of all samples in the order
    of their tokens; it is absent when there are none. Each sample may have any number of images. Where each image has
    a size of its own, `pixel_values` is as the image processor gives it, with the sizes beside it.

    Args:
        image_processor: any image processor that gives all images one size, or says each one's size.
        tokenizer: any tokenizer that has the image token (see `from_parents`).
        chat_template: Jinja chat template with image parts and generation marks.
        image_token: stands for one image in a text; the tokenizer's own `image_token` goes before.
        num_image_tokens: image features per image, behind the ViT's feature selection; None where images have sizes.
        image_sizes_name: what the image processor calls the sizes of images that have each their own.
        image_token_side: how many units of these a token is wide.
        marks_visible_text: whether `mm_token_type_ids` marks the text that images may see by 3, which a model with
            `router_type="attention"` reads.
    """

    return_mm_token_type_ids = True
    text_kwargs = {"return_token_type_ids": False}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
        num_image_tokens: int | None = None,
        image_sizes_name: str | None = None,
        image_token_side: int | None = None,
        marks_visible_text: bool = False,
    ):
        _check_counting(num_image_tokens, image_sizes_name, image_token_side)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.num_image_tokens: Any = num_image_tokens
        self.image_sizes_name = image_sizes_name
        self.image_token_side: Any = image_token_side
        self.marks_visible_text = marks_visible_text
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        token_ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        is_unknown = self.image_token_id in (None, tokenizer.unk_token_id) and self.image_token != tokenizer.unk_token
        if is_unknown or token_ids.count(self.image_token_id) != 1:
            raise ValueError(
                f"The tokenizer has no single token {self.image_token!r} (it reads it as {token_ids}). Build the "
                "processor by VLMoEProcessor.from_parents, which adds it, or name another as image_token."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As the host does; the model's code is written too. The host's Trainer uploads a folder where it has saved
        the processor, and to which it has copied weights and config.json alone (transformers 5.23).
        """
        if self._auto_class is not None and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            _copy_model_code(Path(save_directory))
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_parents(
        cls,
        image_processor,
        tokenizer,
        num_image_tokens: int | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
        image_sizes_name: str | None = None,
        image_token_side: int | None = None,
        marks_visible_text: bool = False,
    ) -> "VLMoEProcessor":
        """Builds the processor from a ViT's image processor and an LLM's tokenizer, both left as they are.

        The processor holds a copy of the tokenizer with up to three changes: the image token as a special token if
        there was none (so `len(processor.tokenizer)` tells whether the embedding has to grow), the EOS token as pad
        token if there was none (a warning says so), and the chat template with image parts and generation marks (see
        chat_templates.py). Of several named templates the one called "default" is taken (a warning names the others).

        Args:
            image_processor: the ViT's.
            tokenizer: the LLM's.
            num_image_tokens: image features per image, behind the ViT's feature selection; None where images have
                sizes.
            chat_template: replaces the tokenizer's own. Without either, a plain "User: ... Assistant: ..." format.
            image_token: the token to add where the tokenizer has no `image_token` of its own.
            image_sizes_name: as the class' own, like `image_token_side` and `marks_visible_text`.
        """
        tokenizer = copy.deepcopy(tokenizer)
        image_token = getattr(tokenizer, "image_token", None) or image_token
        if image_token not in tokenizer.all_special_tokens:
            tokenizer.add_special_tokens({"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False)
        _check_own_id(tokenizer, image_token)
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError("The tokenizer has neither a pad nor an EOS token. Set tokenizer.pad_token.")
            logger.warning(
                "The tokenizer has no pad token: %s, its EOS token, pads. Mask labels by attention_mask, not by the "
                "pad token's id, or the end of an answer is not learned.",
                tokenizer.eos_token,
            )
            tokenizer.pad_token = tokenizer.eos_token
        parent_template = chat_template or tokenizer.chat_template or _default_template(tokenizer)
        template = build_chat_template(
            _pick_template(parent_template),
            image_token,
            special_tokens=tokenizer.special_tokens_map,
            known_tokens=[*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder],
        )
        tokenizer.chat_template = template
        counting = num_image_tokens, image_sizes_name, image_token_side
        return cls(image_processor, tokenizer, template, image_token, *counting, marks_visible_text)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "mm_token_type_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        """What parents' tokenizers and image processors may return beside the inputs of the model's `forward`."""
        used = ["pixel_values", *form_of_sizes(self.image_sizes_name).arguments]
        return ["token_type_ids", *(name for name in self.image_processor.model_input_names if name not in used)]

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """What kind each token is: 1 of an image; 3 text that images may see, where that is marked; else 0.

        Args:
            input_ids: a row of ids per sample.

        Raises:
            ValueError: if that is to be marked, and the chat template does not say what the assistant's turns are.
        """
        types = super().create_mm_token_type_ids(input_ids)
        return add_visible_marks(self, input_ids, types) if self.marks_visible_text else types

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Loads images early, so that an unreadable one is named."""
        if images is not None:
            images = _without_none(images)
            images = _load_images(images) if _count_leaves(images) else None
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """The host's checks, and the counts of each sample: the host compares the batch's sums only."""
        if videos is not None or audio is not None:
            raise ValueError("VLMoEProcessor takes text and images, not videos or audio. Leave them out.")
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        is_nested = isinstance(images, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in images)
        if text is None or not is_nested or len(images) != len(text):
            return
        for index, (sample, sample_images) in enumerate(zip(text, images, strict=True)):
            if (num_tokens := sample.count(self.image_token)) != len(sample_images):
                raise ValueError(
                    f"Sample {index} has {num_tokens} {self.image_token} tokens in its text and {len(sample_images)} "
                    "images. Give one token per image."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for one image: the image token, once per image feature.

        Args:
            image_inputs: what the image processor gave, `pixel_values` of shape `(images, channels, height, width)`
                where all have one size.
            image_idx: which image.
        """
        if self.image_sizes_name is not None:
            if self.image_sizes_name not in image_inputs:
                raise ValueError(
                    f"{type(self.image_processor).__name__} gives no {self.image_sizes_name} beside the pixel values, "
                    "which the vision tower takes. Take the image processor that the tower came with."
                )
            size = image_inputs[self.image_sizes_name][image_idx]
            return self.image_token * count_tokens([size], self.image_token_side)[0]
        first, this = (tuple(image_inputs["pixel_values"][index].shape) for index in (0, image_idx))
        if len(this) != 3 or this != first:
            raise ValueError(
                f"{type(self.image_processor).__name__} gives pixel values of shape {this} for image {image_idx} and "
                f"{first} for the first, but every image has to become one array (channels, height, width) of one "
                "size. Set the image processor's size or crop_size, or switch tiling off."
            )
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Counts the placeholder tokens for images of the given sizes; vLLM asks for it.

        Args:
            image_sizes: (height, width) per image.
        """
        if image_sizes is None:
            return MultiModalData()
        if self.image_sizes_name is None:
            return MultiModalData(
                num_image_tokens=[self.num_image_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
            )
        counts: list[int] = []
        rows: list[int] = []
        for height, width in image_sizes:
            made = self.image_processor(Image.new("RGB", (width, height)), return_tensors="pt")
            counts += count_tokens(made[self.image_sizes_name], self.image_token_side)
            rows.append(len(made["pixel_values"]))
        return MultiModalData(num_image_tokens=counts, num_image_patches=rows)

    def count_image_tokens(self, images: list[Any]) -> int:
        """How many tokens images take.

        Args:
            images: as the processor takes them, or callables that give one; opened only where each has a size of its
                own.
        """
        if self.num_image_tokens is not None:
            return len(images) * self.num_image_tokens
        opened = [_load_image(image() if callable(image) else image) for image in images]
        sizes = [[image.height, image.width] for image in opened]
        return sum(self._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens or ())

    def _normalize_conversations(self, conversation) -> tuple[list, bool]:
        # Arrow gives all parts of a column the same keys: a text part gains `image: None`, an image part `url: None`.
        # transformers 5.23 drops None from messages but not from their parts, and collects it as an image.
        conversations, is_batched = super()._normalize_conversations(conversation)
        for messages in conversations:
            for message in messages:
                if isinstance(message.get("content"), (list, tuple)):
                    message["content"] = [_drop_none(part) for part in message["content"]]
        return conversations, is_batched


__all__ = ["VLMoEProcessor"]
