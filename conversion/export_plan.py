"""From a vlmoe checkpoint to a plan of a native one: which configuration, which tensor goes where. Nothing is written
yet.
"""

import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import GenerationConfig, LlavaConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from modeling_vlmoe.delta_experts import refuse_delta_config
from modeling_vlmoe.expert_choice import chooses_tokens
from modeling_vlmoe.mlp_layouts import find_layout, is_biased
from modeling_vlmoe.text_head import head_maths
from modeling_vlmoe.towers import find_dense_mlp
from modeling_vlmoe.visible_text import parts_reading_text

from .assignments import EXPERTS
from .dense_tensors import DenseTensors, find_dense_tensors
from .llava_parents import NUM_LEFT_OUT
from .mapping import PART_PREFIX, Mapping
from .meta_models import build_on_meta
from .native_arguments import TEXT, ExportArguments
from .native_mapping import DRAWING, LLAVA_NAMES, DenseForm, Names, NativeMapping, all_equal
from .native_processor import build_llava_processor, native_tokenizer
from .native_targets import Pair, choose_pair, dense_layers, to_native
from .parents import Parent
from .plans import load_generation
from .processors import load_part, measure_image

IMAGE_PARTS = ("vision", "connector")


@dataclass
class ExportPlan:
    """Everything that is decided before the first byte is written.

    Attributes:
        args: What was asked for.
        source: The checkpoint.
        tensors: Its tensors.
        config: Its configuration.
        processor: Its processor.
        pixel_shape: Shape of one image's `pixel_values`, (1, channels, height, width).
        pair: How the LLM is written; None for a dense one, which is written as it is.
        native: The written model's configuration.
        companions: What is written beside the weights.
        generation: The checkpoint's own generation settings.
        mapping: What fills every target.
        forms: For the ViT and the connector, where they are sparse.
    """

    args: ExportArguments
    source: Parent
    tensors: DenseTensors
    config: VLMoEConfig
    processor: VLMoEProcessor
    pixel_shape: tuple[int, ...]
    pair: Pair | None
    native: PreTrainedConfig
    companions: list[Any]
    generation: GenerationConfig
    mapping: Mapping
    forms: dict[str, DenseForm]
    drawing = DRAWING

    @property
    def summary(self) -> str:
        """What becomes of what, where the mapping alone does not say it."""
        return ""

    @property
    def not_proved(self) -> str | None:
        """What nothing proves, and why; None where all is proved."""
        return None

    @property
    def is_exact(self) -> bool:
        """Whether the written model is to compute what the checkpoint computes."""
        return all(form.is_equal for form in self.forms.values())

    @property
    def equal_layers(self) -> list[int]:
        """Dense layers of the LLM that are written as equal experts."""
        if self.pair is None or self.pair.sparse.has_dense_layers:
            return []
        return dense_layers(self.config)

    @property
    def num_extra_bytes(self) -> int:
        """How much larger the written model is than the checkpoint's same parts."""
        dropped = self.mapping.dropped["vlmoe"]
        kept = [name for name in self.tensors.names if name not in dropped]
        return self.mapping.num_bytes - sum(
            torch.Size(self.tensors.shape(name)).numel() * self.tensors.dtype(name).itemsize for name in kept
        )


def check_is_vlmoe(given: str, config: PreTrainedConfig) -> None:
    """Refuses other models."""
    if config.model_type != VLMoEConfig.model_type:
        raise ValueError(
            f"{given} is a {config.model_type} model; expected a vlmoe one, as `vlmoe upcycle` and `vlmoe import` "
            "write it. Other models are in transformers' form already."
        )


def native_text_config(config: Any) -> tuple[Pair | None, PreTrainedConfig]:
    """The written LLM's configuration, and the pair it is written by.

    Raises:
        ValueError: naming what cannot be written.
    """
    if config.text_moe is None:
        return None, copy.deepcopy(config.text_config)
    pair = choose_pair(config)
    return pair, to_native(pair, config)


def check_head(config: Any) -> None:
    """LLaVA's head is bare, whatever its LLM's configuration says.

    Raises:
        ValueError: naming the maths.
    """
    named = [*head_maths(config.text_config), *(["a bias"] if config.lm_head_bias else [])]
    if named:
        raise ValueError(
            f"The {config.text_config.model_type} LLM's head computes {', '.join(named)}, which LLaVA leaves out. "
            "Choose --to text, the LM alone."
        )


def check_features(model: Any) -> None:
    """LLaVA's "default" leaves out one token, and its own processor counts on images of one size.

    Raises:
        ValueError: saying what LLaVA would do otherwise.
    """
    config, form = model.config, model.model.image_form
    if form.sizes is not None:
        raise ValueError(
            f"The {config.vision_config.model_type} takes {form.name}, of which LLaVA's processor does not count the "
            "tokens. Choose --to text, the LM alone."
        )
    left_out = config.vision_num_prefix_tokens
    if config.vision_feature_select_strategy == "default" and left_out != NUM_LEFT_OUT:
        raise ValueError(
            f"The connector leaves out {left_out} tokens before the patches (vision_num_prefix_tokens), but LLaVA's "
            f'"default" leaves out {NUM_LEFT_OUT}: it would read the others as patches. Choose --to text, the LM '
            "alone, or tune a model with --vision-feature-select-strategy full."
        )


def check_no_text_gate(config: Any) -> None:
    """Refuses routers of images that read text.

    Raises:
        ValueError: naming the parts.
    """
    if parts := parts_reading_text(config):
        raise ValueError(
            f'The routers of {" and ".join(parts)} read the text beside an image (router_type "attention"), but '
            "serving engines, and transformers' own classes, encode images without any text. Choose --to text, the LM "
            "alone, or use the checkpoint with vlmoe's own code."
        )


def dense_twin(config: Any) -> Any:
    """The model with dense MLPs in ViT and connector, on the meta device."""
    dense_config = copy.deepcopy(config)
    for part in IMAGE_PARTS:
        setattr(dense_config, f"{part}_moe", None)
    return build_on_meta(lambda: VLMoEForConditionalGeneration(dense_config))


def obstacles(moe: Any, are_equal: bool, is_as_wide: bool) -> tuple[str, ...]:
    """Why one dense MLP cannot compute what experts compute.

    Args:
        moe: their `MoEConfig`.
        are_equal: whether they are copies of one another.
        is_as_wide: whether they are as wide as the dense MLP.
    """
    found = {
        "are no longer copies of one another": not are_equal,
        "are not as wide as the dense MLP": not is_as_wide,
        "have weights that do not sum to one (norm_topk_prob is False)": not moe.norm_topk_prob,
        f"have weights that are multiplied (routed_scaling_factor is {moe.routed_scaling_factor})": (
            moe.routed_scaling_factor != 1.0
        ),
        f"choose tokens (router_type is {moe.router_type!r}), and leave some out": chooses_tokens(moe),
        "have a shared expert beside them": bool(moe.num_shared_experts),
    }
    return tuple(reason for reason, is_one in found.items() if is_one)


def dense_forms(source: DenseTensors, config: Any, dense: Any) -> dict[str, DenseForm]:
    """How the experts of ViT and connector would become dense MLPs.

    Args:
        source: The checkpoint's tensors; those of experts are compared.
        config: Its configuration.
        dense: Its dense twin.
    """
    forms = {}
    for part in (part for part in IMAGE_PARTS if config.moe(part) is not None):
        moe = config.moe(part)
        if part == "connector":
            mlps = {
                f"{PART_PREFIX[part]}mlp": (find_layout(dense.model.connector.mlp, part), dense.model.connector.mlp)
            }
        else:
            found = [find_dense_mlp(dense.model.vision_tower, index) for index in moe.layers]
            mlps = {PART_PREFIX[part] + mlp.path: (mlp.layout, mlp.module) for mlp in found}
        stacks = [name for name in source.names if name.partition(EXPERTS)[0] in mlps and EXPERTS in name]
        layouts = {path: (layout, is_biased(mlp, layout)) for path, (layout, mlp) in mlps.items()}
        is_as_wide = all(
            prod(source.shape(f"{path}{EXPERTS}down_proj")[1:])
            == dense.get_parameter(f"{path}.{layout.down}.weight").numel()
            for path, (layout, _) in layouts.items()
        )
        reasons = obstacles(moe, all(all_equal(source.tensor(name)) for name in stacks), is_as_wide)
        forms[part] = DenseForm(layouts, reasons, is_as_wide and not moe.num_shared_experts)
    return forms


def describe_experts(config: Any, part: str) -> str:
    """The experts of a part, for messages."""
    moe = config.moe(part)
    where = "the connector" if part == "connector" else f"layers {moe.layers} of the ViT"
    return f"{where} ({moe.num_experts} experts, top-{moe.num_experts_per_tok})"


def llava_config(config: Any, text: PreTrainedConfig, processor: VLMoEProcessor) -> LlavaConfig:
    """LLaVA around a text configuration, with this model's ViT and connector."""
    vision = copy.deepcopy(config.vision_config)
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=config.image_token_id,
        image_seq_length=processor.num_image_tokens,
        projector_hidden_act=config.connector_hidden_act,
        multimodal_projector_bias=config.connector_bias,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        tie_word_embeddings=config.tie_word_embeddings,
    )


def plan_export(args: ExportArguments, source: Parent) -> ExportPlan:
    """Decides everything; experts of ViT and connector are read, to see whether they are equal.

    Raises:
        ValueError: for whatever cannot be written without loss, naming it.
    """
    check_is_vlmoe(source.given, source.config)
    refuse_delta_config(source.config, "vlmoe export")
    tensors = find_dense_tensors(source)
    model: Any = tensors.model
    config = model.config
    processor = load_part(VLMoEProcessor, source, "processor")
    twin = dense_twin(config)
    pixel_shape = measure_image(processor.image_processor, twin, source).pixel_shape
    pair, text = native_text_config(config)
    forms: dict[str, DenseForm] = {}
    if args.to != TEXT:
        check_no_text_gate(config)
        check_head(config)
        check_features(model)
        forms = dense_forms(tensors, config, twin)
        native: PreTrainedConfig = llava_config(config, text, processor)
        native.architectures = ["LlavaForConditionalGeneration"]
        names, companions = LLAVA_NAMES, [build_llava_processor(processor, config, pixel_shape)]
    else:
        native, names, companions = text, text_names(text), [native_tokenizer(processor)]
        native.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
        native.tie_word_embeddings = config.tie_word_embeddings
    dtype = tensors.dtype(f"{PART_PREFIX['text']}{first_embedding(model)}")
    for one in (native, getattr(native, "text_config", None), getattr(native, "vision_config", None)):
        if one is not None:
            one.dtype, one._name_or_path = dtype, ""
    mapping = NativeMapping(tensors, config, pair, names, forms, dtype).build()
    generation = load_generation(source, config)
    return ExportPlan(
        args, source, tensors, config, processor, pixel_shape, pair, native, companions, generation, mapping, forms
    )


def first_embedding(model: Any) -> str:
    """The name, in the LLM, of its embedding's weight."""
    wanted = model.get_input_embeddings()
    found = next(name for name, module in model.model.language_model.named_modules() if module is wanted)
    return f"{found}.weight"


def text_names(text: PreTrainedConfig) -> Names:
    """What the tensors of an LM alone are called."""
    from .native_tensors import AUTO_CLASSES

    model: Any = build_on_meta(lambda: AUTO_CLASSES["text"].from_config(text))
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    return Names(f"{model.base_model_prefix}.", f"{head}.weight")
