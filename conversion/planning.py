"""From arguments to a plan: which parents, which configuration, which tensor goes where. Nothing is written yet."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.configuration_vlmoe import PARTS, VLMoEConfig
from modeling_vlmoe.text_head import find_head

from .arguments import UpcycleArguments, parse_layers
from .connector_init import DrawnConnector
from .dense_tensors import DenseTensors, find_dense_tensors
from .expert_init import DELTA, EXPERT_INITS
from .gaps import DENSE_CLAIM
from .llava_parents import is_llava, name_in_vlmoe, vlmoe_fields
from .mapping import PART_PREFIX, DenseTensor, Drawing, Mapping, SparseMLP, map_tensors, sparse_mlps
from .meta_models import build_on_meta, target_shapes
from .native_tensors import find_native_tensors
from .parents import BROKEN, Parent, open_parents
from .processors import build_processor
from .router_init import ROUTER_INITS
from .streaming import read_json

DEFAULT_TEXT_EXPERTS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        pixel_shape: Shape of one image's `pixel_values`, (1, channels, height, width); see `processors.Measured`.
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


def expert_kind(args: UpcycleArguments) -> dict[str, Any]:
    """What `--expert-init` says of every part's experts.

    Raises:
        ValueError: for a rank without anything that has one.
    """
    if args.expert_init == DELTA:
        return {"expert_type": "delta", "expert_rank": args.expert_rank}
    if args.expert_rank is not None:
        raise ValueError(
            f"--expert-rank {args.expert_rank} is given, but experts of --expert-init {args.expert_init} have no "
            "rank; leave it out, or choose --expert-init delta."
        )
    return {}


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
    asked, kind = {}, expert_kind(args)
    for part, count in counts.items():
        options = {"num_experts_per_tok": getattr(args, f"{part}_top_k")}
        if part != "connector":
            options["layers"] = parse_layers(getattr(args, f"{part}_layers"), f"{part}_layers")
        given = {name: value for name, value in options.items() if value is not None}
        if count is not None:
            asked[part] = {"num_experts": count} | kind | given
        elif given:
            flag = f"--{part}-{'top-k' if 'num_experts_per_tok' in given else 'layers'}"
            raise ValueError(f"{flag} is given, but this part stays dense; give --{part}-experts too.")
    return asked


def build_dense_config(
    args: UpcycleArguments, parents: dict[str, Parent], dense: dict[str, DenseTensors]
) -> VLMoEConfig:
    """The configuration of the dense vision-language model that is upcycled.

    Raises:
        ValueError: when a dense VLM is asked to read another feature layer than it was trained on.
    """
    choices = {name: getattr(args, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    given = {name: value for name, value in choices.items() if value is not None}
    if "vlm" in parents:
        parent: Any = parents["vlm"].config
        config: Any = (
            VLMoEConfig(**vlmoe_fields(parent, parent.text_config)) if is_llava(parent) else copy.deepcopy(parent)
        )
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
        lm_head_bias=find_head(dense["text"].model)[1].bias is not None,
        **given,
    )


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
        return name_in_vlmoe(name) if is_llava(model.config) else name
    if role == "vision":
        return PART_PREFIX["vision"] + name
    head, _ = find_head(model)
    if name.startswith(f"{head}."):
        return f"lm_head.{name.removeprefix(f'{head}.')}"
    base = f"{model.base_model_prefix}."
    return PART_PREFIX["text"] + name.removeprefix(base) if name.startswith(base) else name


def plan_upcycle(args: UpcycleArguments) -> UpcyclePlan:
    """Decides everything, from the parents' headers and configurations alone.

    Raises:
        ValueError: for whatever the user can mend.
    """
    drawing, asked = choose_drawing(args), asked_experts(args)
    parents = open_parents(args)
    dense = {
        role: find_native_tensors(parent) if is_llava(parent.config) and role == "vlm" else find_dense_tensors(parent)
        for role, parent in parents.items()
    }
    dense_config = build_dense_config(args, parents, dense)
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
