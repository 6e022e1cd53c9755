"""The processor of what is made: a ViT's image processor and an LLM's tokenizer behind one, or a parent's own."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, LlavaProcessor

from modeling_vlmoe import VLMoEProcessor
from modeling_vlmoe.image_inputs import FORMS, blank_image, read_features
from modeling_vlmoe.towers import num_prefix_tokens, tower_layers

from .llava_parents import is_llava
from .parents import BROKEN, Parent

# Width and height of pictures: any will do to learn what becomes of one; unlike, where each keeps its own.
SHOWN_SIZES = ((64, 48), (40, 96))
# Any one of these sets is a tokenizer's vocabulary; without one the host builds an empty tokenizer.
VOCABULARIES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
)


def load_part(auto_class: Any, parent: Parent, what: str) -> Any:
    """Loads an image processor, a tokenizer or a processor from a parent's folder; the parent's own code is not run.

    Raises:
        ValueError: when it has none.
    """
    files = {file.name for file in parent.folder.iterdir()}
    if auto_class is not AutoImageProcessor and not any(vocabulary <= files for vocabulary in VOCABULARIES):
        known = ", ".join(" + ".join(sorted(vocabulary)) for vocabulary in VOCABULARIES)
        raise ValueError(f"{parent.given} has no tokenizer: expected a vocabulary file, one of {known}.")
    try:
        return auto_class.from_pretrained(parent.folder, trust_remote_code=False)
    except (*BROKEN, ImportError) as error:  # some classes of the host need a package that may not be there
        raise ValueError(f"{parent.given} has no {what} that can be loaded. Add or mend it: {error}") from error


@dataclass(frozen=True)
class Measured:
    """What an image processor and a ViT make of pictures.

    Attributes:
        pixel_shape: Shape of the pixel values of one picture; of those of `SHOWN_SIZES` where each has its own size.
        num_tokens: How many tokens a picture takes; None where it has its own number.
        sizes_name: What the image processor calls the pictures' sizes then.
        token_side: How many units of these a token is wide.
    """

    pixel_shape: tuple[int, ...]
    num_tokens: int | None = None
    sizes_name: str | None = None
    token_side: int | None = None


def process_pictures(image_processor: Any, sizes: Sequence[tuple[int, int]], parent: Parent) -> Any:
    """What an image processor makes of black pictures of these sizes, (width, height).

    Raises:
        ValueError: when it cannot read a picture.
    """
    try:
        return image_processor([Image.new("RGB", size) for size in sizes], return_tensors="pt")
    except BROKEN as error:
        raise ValueError(
            f"The image processor of {parent.given} cannot read a picture. Mend its configuration: {error}"
        ) from error


def measure_image(image_processor: Any, dense: Any, parent: Parent) -> Measured:
    """What pictures become: the shape of their pixel values, and how many features the ViT makes of them.

    Raises:
        ValueError: when the image processor and the ViT do not belong together.
    """
    form, tower_class = dense.model.image_form, type(dense.model.vision_tower)
    if missing := form.missing_arguments(tower_class):
        raise ValueError(
            f"The ViT of {parent.given}, a {tower_class.__name__}, must be given {', '.join(missing)} beside its "
            f"pixels; supported are ViTs that take {', '.join(one.name for one in FORMS)}. Choose one of these."
        )
    if form.sizes is not None:
        return measure_sizes(image_processor, dense, parent)
    shape = tuple(process_pictures(image_processor, SHOWN_SIZES[:1], parent)["pixel_values"].shape)
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(
            f"The image processor of {parent.given} makes {shape} of one picture; expected (1, channels, height, "
            "width)."
        )
    try:
        num_tokens = count_features(dense.model, shape)
    except BROKEN as error:
        raise ValueError(
            f"The image processor of {parent.given} makes pixel values {shape} of a picture, which the ViT, a "
            f"{tower_class.__name__} for images of "
            f"{getattr(dense.config.vision_config, 'image_size', 'another size')} pixels a side, does not take: "
            f"{error}. Set size, crop_size, do_resize in its preprocessor_config.json or processor_config.json, or "
            f"choose a ViT that takes {', '.join(one.name for one in FORMS)}."
        ) from error
    check_num_tokens(num_tokens, shape, dense, parent)
    return Measured(shape, num_tokens)


def check_num_tokens(num_tokens: int, shape: tuple[int, ...], dense: Any, parent: Parent) -> None:
    """Refuses a ViT whose features are not its patches, with the tokens before them where these are kept.

    Args:
        num_tokens: How many features it makes of one image.
        shape: (1, channels, height, width) of that.
        dense: The dense model.
        parent: The ViT's.

    Raises:
        ValueError: naming both numbers.
    """
    vision = dense.config.vision_config
    patch = vision.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    num_patches = (shape[2] // height) * (shape[3] // width)
    left_out = dense.config.vision_num_prefix_tokens if dense.config.vision_feature_select_strategy == "default" else 0
    if num_tokens + left_out - num_patches not in (0, num_prefix_tokens(dense.model.vision_tower)):
        raise ValueError(
            f"The ViT of {parent.given}, a {type(dense.model.vision_tower).__name__}, gives {num_tokens + left_out} "
            f"tokens of an image of {shape[2]} x {shape[3]} pixels, which has {num_patches} patches of "
            f"{height} x {width}: tokens that stand for no patch would be read as image. Choose another ViT."
        )


@torch.no_grad()
def count_features(body: Any, shape: tuple[int, ...]) -> int:
    """How many features a ViT makes of one image.

    Args:
        body: the dense model on the meta device.
        shape: (1, channels, height, width).
    """
    try:
        return body.get_image_features(torch.empty(shape, device="meta")).pooler_output[0].shape[0]
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
    tower = copy.deepcopy(body.vision_tower)  # it looks at values (Idefics3): one layer of it, all zeros
    del tower_layers(tower)[1][1:]
    tower.to_empty(device="cpu")
    for tensor in (*tower.parameters(), *tower.buffers()):
        tensor.zero_()
    outputs = tower(torch.zeros(shape), output_hidden_states=True, return_dict=True)
    features, _ = read_features(outputs, body.config, body.image_form, {}, layers=[-1])
    return features.shape[1]


def measure_sizes(image_processor: Any, dense: Any, parent: Parent) -> Measured:
    """As `measure_image`, where each picture has its own size: the proof runs the ViT on pictures of several.

    Raises:
        ValueError: when the image processor does not give what the ViT takes.
    """
    form, vision = dense.model.image_form, dense.config.vision_config
    made = process_pictures(image_processor, SHOWN_SIZES, parent)
    if missing := [key for key in form.arguments if key not in made]:
        raise ValueError(
            f"The image processor of {parent.given} is a {type(image_processor).__name__}, which gives no "
            f"{', '.join(missing)}; the {vision.model_type} takes {form.name}. Take the one that the ViT came with."
        )
    pixels, blank = made["pixel_values"], blank_image(form, vision)["pixel_values"]
    axis = 1 if blank.ndim == 4 else -1  # channels of images, values of patches
    side = form.token_side(vision)
    is_whole = not any(int(units) % side for size in made[form.sizes] for units in size[-2:])
    if pixels.ndim != blank.ndim or pixels.shape[axis] != blank.shape[axis] or not is_whole:
        raise ValueError(
            f"The image processor of {parent.given} makes pixel values {tuple(pixels.shape)} of pictures whose "
            f"{form.sizes} are {torch.as_tensor(made[form.sizes]).tolist()}, but the {vision.model_type} was built "
            f"for patches of {vision.patch_size} pixels a side and tokens of {side} units of {form.sizes} a side. Set "
            "patch_size, merge_size in its preprocessor_config.json or processor_config.json."
        )
    return Measured(tuple(pixels.shape), None, form.sizes, side)


def build_processor(parents: dict[str, Parent], dense: Any) -> tuple[VLMoEProcessor, tuple[int, ...]]:
    """The processor, and the shape of one image's pixel values; how many tokens an image takes is measured.

    Raises:
        ValueError: when a dense vlmoe parent's processor does not say what is measured.
    """
    if "vlm" not in parents:
        image_processor = load_part(AutoImageProcessor, parents["vision"], "image processor")
        tokenizer = load_part(AutoTokenizer, parents["text"], "tokenizer")
        measured = measure_image(image_processor, dense, parents["vision"])
        ours = VLMoEProcessor.from_parents(
            image_processor,
            tokenizer,
            measured.num_tokens,
            image_sizes_name=measured.sizes_name,
            image_token_side=measured.token_side,
        )
        return ours, measured.pixel_shape
    parent = parents["vlm"]
    if is_llava(parent.config):
        return convert_processor(parent, dense)
    processor = load_part(VLMoEProcessor, parent, "processor")
    measured = measure_image(processor.image_processor, dense, parent)
    if processor.num_image_tokens != measured.num_tokens:
        raise ValueError(
            f"The processor of {parent.given} has num_image_tokens {processor.num_image_tokens}, but its ViT makes "
            f"{measured.num_tokens} features of an image. Correct its processor_config.json."
        )
    found = (processor.image_sizes_name, processor.image_token_side)
    if found != (measured.sizes_name, measured.token_side):
        raise ValueError(
            f"The processor of {parent.given} has image_sizes_name {found[0]} and image_token_side {found[1]}, but "
            f"its ViT takes {measured.sizes_name} and {measured.token_side}. Correct its processor_config.json."
        )
    if dense.config.image_token_id not in (None, processor.image_token_id):
        raise ValueError(
            f"config.json of {parent.given} has image_token_id {dense.config.image_token_id}, but its tokenizer's "
            f"{processor.image_token} is {processor.image_token_id}. Correct config.json."
        )
    return processor, measured.pixel_shape


def convert_processor(parent: Parent, model: Any) -> tuple[VLMoEProcessor, tuple[int, ...]]:
    """A LLaVA's processor as a vlmoe one, and the shape of one image's pixel values.

    Args:
        parent: The LLaVA.
        model: The same model in vlmoe's form, on the meta device.

    Raises:
        ValueError: when processor and model do not belong together.
    """
    native = load_part(AutoProcessor, parent, "processor")
    if not isinstance(native, LlavaProcessor):
        raise ValueError(
            f"The processor of {parent.given} is a {type(native).__name__}; expected a LlavaProcessor, which writes "
            "nothing but image tokens for an image. Take the towers apart: the same folder as --text-model and as "
            "--vision-model (the connector is then new)."
        )
    if model.model.image_form.sizes is not None:
        raise ValueError(
            f"The ViT of {parent.given} takes {model.model.image_form.name}, of which a LlavaProcessor does not count "
            "the tokens. Take the towers apart: the same folder as --text-model and as --vision-model."
        )
    measured = measure_image(native.image_processor, model, parent)
    if native.image_token_id != model.config.image_token_id:
        raise ValueError(
            f"config.json of {parent.given} has image_token_index {model.config.image_token_id}, but its processor's "
            f"{native.image_token} is {native.image_token_id}. Correct config.json."
        )
    template = native.chat_template or native.tokenizer.chat_template
    ours = VLMoEProcessor.from_parents(
        native.image_processor,
        native.tokenizer,
        measured.num_tokens,
        chat_template=template,
        image_token=native.image_token,
    )
    return ours, measured.pixel_shape
