"""From arguments to a plan: which parents, which configuration, which tensor goes where. Nothing is written yet."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.configuration_vlmoe import VLMoEConfig
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.text_head import find_head
from modeling_vlmoe.visible_marks import find_answer_tokens
from modeling_vlmoe.visible_text import parts_reading_text

from .arguments import EVERY_SECOND, UpcycleArguments, parse_layers
from .assignments import DenseTensor
from .connector_init import DrawnConnector
from .dense_tensors import DenseTensors, find_dense_tensors
from .expert_init import DELTA
from .host_parents import is_host
from .host_planning import plan_in_place
from .llava_parents import is_llava, name_in_vlmoe, vlmoe_fields
from .mapping import PART_PREFIX, map_tensors, sparse_mlps
from .meta_models import build_on_meta, target_shapes
from .native_tensors import find_native_tensors
from .parents import Parent, open_parents
from .part_arguments import FLAGS, read_fields
from .plans import UpcyclePlan, choose_drawing, choose_dtype, load_generation
from .processors import build_processor

DEFAULT_TEXT_EXPERTS = 8
# What the flags of a part are called, by the field that each sets.


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
        options["router_type"] = getattr(args, f"{part}_router")
        given = {name: value for name, value in options.items() if value is not None}
        more = read_fields(getattr(args, f"{part}_moe"), f"{part}_moe")
        if count is not None:
            asked[part] = {"num_experts": count} | kind | given | more
        elif given or more:
            flag = FLAGS[next(iter(given))].format(part=part) if given else f"--{part}-moe"
            raise ValueError(f"{flag} is given, but this part stays dense; give --{part}-experts too.")
    return asked


def fit_layers(args: UpcycleArguments, asked: dict[str, dict[str, Any]], num_layers: int) -> None:
    """Makes every second layer, where it is asked for, every second of those that the LLM has."""
    if args.text_layers in EVERY_SECOND and "text" in asked:
        asked["text"]["layers"] = [layer for layer in asked["text"]["layers"] if layer < num_layers]


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


def plan_composite(args: UpcycleArguments, asked: dict[str, dict], parents: dict[str, Parent]) -> UpcyclePlan:
    """Decides everything about our own composite, from the parents' headers and configurations alone.

    Raises:
        ValueError: for whatever the user can mend.
    """
    dense = {
        role: find_native_tensors(parent) if is_llava(parent.config) and role == "vlm" else find_dense_tensors(parent)
        for role, parent in parents.items()
    }
    dense_config = build_dense_config(args, parents, dense)
    dense_vlm = build_on_meta(lambda: VLMoEForConditionalGeneration(dense_config))
    processor, pixel_shape = build_processor(parents, dense_vlm)
    config = build_config(dense_config, asked, processor)
    processor.marks_visible_text = bool(parts_reading_text(config))
    if processor.marks_visible_text:
        find_answer_tokens(processor)  # refuses a chat template that does not say what the assistant's turns are
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
        drawing=choose_drawing(args),
        dtype=dtype,
    )


def plan_upcycle(args: UpcycleArguments) -> UpcyclePlan:
    """Decides everything, before the first byte is written.

    Raises:
        ValueError: for whatever the user can mend.
    """
    choose_drawing(args)
    asked, parents = asked_experts(args), open_parents(args)
    if args.text_layers in EVERY_SECOND:
        text = parents.get("text") or parents["vlm"]
        fit_layers(args, asked, text.tower_config.get_text_config().num_hidden_layers)
    if "vlm" in parents and is_host(parents["vlm"].config):
        return plan_in_place(args, asked, parents["vlm"])
    return plan_composite(args, asked, parents)
