"""From arguments to a plan: which parents, which configuration, which tensor goes where. Nothing is written yet."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.configuration_vlmoe import PARTS, VLMoEConfig

from .arguments import UpcycleArguments, parse_layers
from .connector_init import DrawnConnector
from .dense_tensors import DenseTensors, find_dense_tensors
from .expert_init import EXPERT_INITS
from .gaps import DENSE_CLAIM
from .mapping import PART_PREFIX, DenseTensor, Drawing, Mapping, SparseMLP, map_tensors, sparse_mlps
from .meta_models import build_on_meta, target_shapes
from .parents import BROKEN, Parent, open_parents
from .router_init import ROUTER_INITS
from .streaming import read_json

DEFAULT_TEXT_EXPERTS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN_IMAGE = (64, 48)  # any picture will do to learn what the image processor makes of one
# Any one of these sets is a tokenizer's vocabulary; without one the host builds an empty tokenizer.
VOCABULARIES = (
    {"tokenizer.json"},
    {"tokenizer.model"},
    {"vocab.json", "merges.txt"},
    {"vocab.txt"},
    {"spiece.model"},
    {"sentencepiece.bpe.model"},
)


@dataclass
class UpcyclePlan:
    """Everything that is decided before the first byte is written.

    Attributes:
        args: What was asked for.
        parents: The dense parents by role.
        dense: Their tensors under their own models' names, by role.
        dense_tensors: The tensors of the dense vision-language model, by name; for two parents with a drawn connector.
        dense_config: Its configuration.
        config: The sparse model's.
        processor: The sparse model's.
        generation: The sparse model's: the LLM's own.
        pixel_shape: Shape of one image's `pixel_values`, (1, channels, height, width).
        mlps: The MLPs that become sparse, by path.
        mapping: What fills every target.
        drawing: Inits and seed.
        dtype: What is written.
        claim: What a failed proof says.
    """

    claim = DENSE_CLAIM

    args: UpcycleArguments
    parents: dict[str, Parent]
    dense: dict[str, DenseTensors]
    dense_tensors: dict[str, DenseTensor]
    dense_config: VLMoEConfig
    config: VLMoEConfig
    processor: VLMoEProcessor
    generation: GenerationConfig
    pixel_shape: tuple[int, ...]
    mlps: dict[str, SparseMLP]
    mapping: Mapping
    drawing: Drawing
    dtype: torch.dtype


def stored_dtype(dense: DenseTensors) -> torch.dtype:
    """The floating-point dtype that most of a parent's parameters are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for name in dense.names:
        dtype = dense.dtype(name)
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + torch.Size(dense.shape(name)).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def choose_dtype(args: UpcycleArguments, dense: dict[str, DenseTensors]) -> torch.dtype:
    """What is written: what was asked for, else the dtype of the LLM (or of the dense vlmoe model)."""
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is not known; expected one of {', '.join(DTYPES)}.")
    return DTYPES[args.dtype] if args.dtype else stored_dtype(dense.get("text") or dense["vlm"])


def choose_drawing(args: UpcycleArguments) -> Drawing:
    """The inits that were named, if there are such."""
    for option, name, known in (
        ("--expert-init", args.expert_init, EXPERT_INITS),
        ("--router-init", args.router_init, ROUTER_INITS),
    ):
        if name not in known:
            raise ValueError(f"{option} {name} is not known; expected one of {', '.join(known)}.")
    return Drawing(args.expert_init, args.router_init, args.seed)


def asked_experts(args: UpcycleArguments) -> dict[str, dict[str, Any]]:
    """For each part that becomes sparse, what was asked of it.

    Raises:
        ValueError: for an option of a part that stays dense.
    """
    counts = {part: getattr(args, f"{part}_experts") for part in PARTS}
    named = [f"--{part}-experts" for part, count in counts.items() if count is not None]
    if args.dense and named:
        raise ValueError(f"--dense gives no part experts, but {', '.join(named)} is given; leave one of them out.")
    if not args.dense and not named:
        counts["text"] = DEFAULT_TEXT_EXPERTS
    asked = {}
    for part, count in counts.items():
        options = {"num_experts_per_tok": getattr(args, f"{part}_top_k")}
        if part != "connector":
            options["layers"] = parse_layers(getattr(args, f"{part}_layers"), f"{part}_layers")
        given = {name: value for name, value in options.items() if value is not None}
        if count is not None:
            asked[part] = {"num_experts": count} | given
        elif given:
            flag = f"--{part}-{'top-k' if 'num_experts_per_tok' in given else 'layers'}"
            raise ValueError(f"{flag} is given, but this part stays dense; give --{part}-experts too.")
    return asked


def build_dense_config(args: UpcycleArguments, parents: dict[str, Parent]) -> VLMoEConfig:
    """The configuration of the dense vision-language model that is upcycled.

    Raises:
        ValueError: when a dense vlmoe parent is asked to read another feature layer than it was trained on.
    """
    choices = {name: getattr(args, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    given = {name: value for name, value in choices.items() if value is not None}
    if "vlm" in parents:
        config: Any = copy.deepcopy(parents["vlm"].config)
        for name, value in given.items():
            if value != getattr(config, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value}, but the connector of {parents['vlm'].given} was trained "
                    "with "
                    f"{getattr(config, name)}; leave it out."
                )
        return config
    return VLMoEConfig(
        text_config=parents["text"].tower_config.to_dict(),
        vision_config=parents["vision"].tower_config.to_dict(),
        **given,
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
    except BROKEN as error:
        raise ValueError(f"{parent.given} has no {what} that can be loaded. Add or mend it: {error}") from error


def load_generation(parent: Parent, config: VLMoEConfig) -> GenerationConfig:
    """The LLM's generation settings, else those of its configuration.

    Raises:
        ValueError: when they cannot be read, or could not be written again.
    """
    file = parent.folder / GENERATION_CONFIG_NAME
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    try:
        read_json(file)  # names what is wrong with it
        generation = GenerationConfig.from_pretrained(parent.folder)
        generation.validate()
    except BROKEN as error:
        raise ValueError(f"{file} cannot be used: {error}. Mend it, or remove it for the defaults.") from error
    return generation


def measure_image(image_processor: Any, dense: PreTrainedModel, parent: Parent) -> tuple[tuple[int, ...], int]:
    """What one picture becomes: the shape of its pixel values, and how many features the ViT makes of them.

    Raises:
        ValueError: when the image processor and the ViT do not belong together.
    """
    try:
        picture = Image.new("RGB", SHOWN_IMAGE)
        shape = tuple(image_processor(picture, return_tensors="pt")["pixel_values"].shape)
    except BROKEN as error:
        raise ValueError(
            f"The image processor of {parent.given} cannot read a picture. Mend its configuration: {error}"
        ) from error
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(
            f"The image processor of {parent.given} makes {shape} of one picture; expected (1, channels, height, "
            "width)."
        )
    try:
        features = dense.model.get_image_features(torch.empty(shape, device="meta")).pooler_output[0]
    except BROKEN as error:
        raise ValueError(
            f"The image processor of {parent.given} makes pixel values {shape} of a picture, but the ViT was built "
            f"for images of {getattr(dense.config.vision_config, 'image_size', 'another size')} pixels a side: "
            f"{error}. Set size, crop_size, do_resize in its preprocessor_config.json or processor_config.json."
        ) from error
    return shape, features.shape[0]


def build_processor(parents: dict[str, Parent], dense: PreTrainedModel) -> tuple[VLMoEProcessor, tuple[int, ...]]:
    """The processor, and the shape of one image's pixel values; how many tokens an image takes is measured.

    Raises:
        ValueError: when a dense vlmoe parent's processor does not say what is measured.
    """
    if "vlm" not in parents:
        image_processor = load_part(AutoImageProcessor, parents["vision"], "image processor")
        tokenizer = load_part(AutoTokenizer, parents["text"], "tokenizer")
        shape, num_features = measure_image(image_processor, dense, parents["vision"])
        return VLMoEProcessor.from_parents(image_processor, tokenizer, num_image_tokens=num_features), shape
    parent = parents["vlm"]
    processor = load_part(VLMoEProcessor, parent, "processor")
    shape, num_features = measure_image(processor.image_processor, dense, parent)
    if processor.num_image_tokens != num_features:
        raise ValueError(
            f"The processor of {parent.given} has num_image_tokens {processor.num_image_tokens}, but its ViT makes "
            f"{num_features} features of an image. Correct its processor_config.json."
        )
    if dense.config.image_token_id not in (None, processor.image_token_id):
        raise ValueError(
            f"config.json of {parent.given} has image_token_id {dense.config.image_token_id}, but its tokenizer's "
            f"{processor.image_token} is {processor.image_token_id}. Correct config.json."
        )
    return processor, shape


def build_config(dense_config: VLMoEConfig, asked: dict[str, dict], processor: VLMoEProcessor) -> VLMoEConfig:
    """The sparse model's configuration: the dense one, with experts, the image token, and rows for new tokens."""
    config = copy.deepcopy(dense_config)
    config.image_token_id = processor.image_token_id
    top_id = max(processor.tokenizer.get_vocab().values())  # not their number: a vocabulary may have holes
    config.text_config.vocab_size = max(config.text_config.vocab_size, top_id + 1)
    for part, moe in asked.items():
        setattr(config, f"{part}_moe", moe)
    config.architectures = [VLMoEForConditionalGeneration.__name__]
    for one in (config, config.text_config, config.vision_config):
        one._name_or_path = ""  # a path of this machine, which the host writes into config.json
    return config


def name_dense_tensors(
    dense: dict[str, DenseTensors], model: PreTrainedModel, args: UpcycleArguments, dtype: torch.dtype
) -> dict[str, DenseTensor]:
    """All parents' tensors by their names in the dense vision-language model.

    Raises:
        ValueError: when it has no such tensor, or one that no parent fills.
    """
    named: dict[str, DenseTensor] = {}
    for role, tensors in dense.items():
        for name in tensors.names:
            named[name_in_vlm(role, name, tensors.model)] = DenseTensor(tensors, name)
    shapes = target_shapes(model)
    if "vlm" not in dense:
        drawn = {name: shape for name, shape in shapes.items() if name.startswith(PART_PREFIX["connector"])}
        connector = DrawnConnector(drawn, args.seed, model.config.initializer_range, dtype)
        named |= {name: DenseTensor(connector, name) for name in connector.names}
    if strange := sorted(set(named) - set(shapes)):
        raise ValueError(
            f"The dense parents have tensors that the model has no place for: "
            f"{', '.join(strange[:5])}. Leave them out."
        )
    if missing := sorted(set(shapes) - set(named)):
        raise ValueError(f"No parent has the tensors {', '.join(missing[:5])} of the dense model. Add them to one.")
    return named


def name_in_vlm(role: str, name: str, model: PreTrainedModel) -> str:
    """A parent's tensor's name in the vision-language model."""
    if role == "vlm":
        return name
    if role == "vision":
        return PART_PREFIX["vision"] + name
    base = f"{model.base_model_prefix}."
    return PART_PREFIX["text"] + name.removeprefix(base) if name.startswith(base) else name


def plan_upcycle(args: UpcycleArguments) -> UpcyclePlan:
    """Decides everything, from the parents' headers and configurations alone.

    Raises:
        ValueError: for whatever the user can mend.
    """
    drawing, asked = choose_drawing(args), asked_experts(args)
    parents = open_parents(args)
    dense = {role: find_dense_tensors(parent) for role, parent in parents.items()}
    dense_config = build_dense_config(args, parents)
    dense_vlm = build_on_meta(lambda: VLMoEForConditionalGeneration(dense_config))
    processor, pixel_shape = build_processor(parents, dense_vlm)
    config = build_config(dense_config, asked, processor)
    generation = load_generation(parents.get("text") or parents["vlm"], config)
    sparse = build_on_meta(lambda: VLMoEForConditionalGeneration(config))
    dtype = choose_dtype(args, dense)
    for one in (config, config.text_config, config.vision_config):
        one.dtype = dtype
    mlps = sparse_mlps(dense_vlm, sparse)
    named = name_dense_tensors(dense, dense_vlm, args, dtype)
    dropped = {role: tensors.dropped for role, tensors in dense.items()}
    mapping = map_tensors(named, mlps, sparse, dtype, dropped)
    return UpcyclePlan(
        args=args,
        parents=parents,
        dense=dense,
        dense_tensors=named,
        dense_config=dense_config,
        config=config,
        processor=processor,
        generation=generation,
        pixel_shape=pixel_shape,
        mlps=mlps,
        mapping=mapping,
        drawing=drawing,
        dtype=dtype,
    )
