"""From arguments to a plan for a VLM that stays in its own class: nothing but MLPs changes, and every other tensor
keeps its name.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.configuration_vlmoe import VLMoEConfig
from modeling_vlmoe.modeling_in_place import sparse_class_of
from modeling_vlmoe.parts import text_root, vision_root
from modeling_vlmoe.visible_marks import find_answer_tokens
from modeling_vlmoe.visible_text import parts_reading_text

from .arguments import NATIVE, UpcycleArguments
from .assignments import DenseTensor
from .dense_tensors import DenseTensors
from .host_parents import host_values
from .host_processor_classes import check_image_processor_named, name_classes
from .host_processors import copy_processor, from_parent
from .mapping import map_tensors, sparse_mlps
from .meta_models import build_vlm
from .native_tensors import find_native_tensors
from .parents import Parent
from .plans import UpcyclePlan, choose_drawing, choose_dtype, load_generation

# Settings of the composite, whose image path we build; a host's own is as it was trained.
COMPOSITE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy")
# What ViTs call what they are given.
PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass
class InPlacePlan(UpcyclePlan):
    """A plan for a VLM that is made sparse in place.

    Attributes:
        not_read: What the processor cannot read on this machine, and so is not proved; None where it reads all.
        dense_vits: ViTs beside the one whose experts were asked for, which stay dense.
    """

    not_read: str | None = None
    dense_vits: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        dense = [f"stays dense: {', '.join(self.dense_vits)}, beside the ViT with experts"] if self.dense_vits else []
        return super().remarks + dense

    def write_processor(self, folder: Path) -> None:
        """The host's processor, untouched, but for names of classes that transformers would not find by our type."""
        copy_processor(self.parents["vlm"].folder, folder)
        name_classes(folder, self.processor, self.config.body_model_type)

    def describe_images(self) -> dict[str, Any]:
        """How images are read is the host's own matter."""
        return {
            "body_model_type": self.config.body_model_type,
            "processor": type(self.processor).__name__,
            "not_proved": self.not_read,
            "dense_vits": self.dense_vits,
        }


def check_options(args: UpcycleArguments, parent: Parent) -> None:
    """Refuses options that mean nothing for a VLM that stays in its own class.

    Raises:
        ValueError: naming the option.
    """
    model_type = parent.config.model_type
    if args.dense:
        raise ValueError(
            f"--dense is given, but --vlm-model {parent.given} is a dense {model_type} already; it is tuned by "
            "transformers as it is. Leave --dense out, or give parts experts."
        )
    if args.format == NATIVE:
        raise ValueError(
            f"--format {NATIVE} writes LLaVA around a sparse LM, but --vlm-model {parent.given} is a {model_type}, "
            "which stays in its own class. Leave --format out; `vlmoe export` writes the result in transformers' own "
            "classes, where they have one for it."
        )
    for name in COMPOSITE_OPTIONS:
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is given, but the connector of {parent.given} ({model_type}) reads what "
                "it was trained on. Leave it out."
            )


def sparse_config(parent: Parent, asked: dict[str, dict[str, Any]]) -> Any:
    """The parent's configuration with experts; its own stays as it is."""
    config = VLMoEConfig.from_dict(host_values(parent.config) | {f"{part}_moe": moe for part, moe in asked.items()})
    config.architectures = [sparse_class_of(VLMoEForConditionalGeneration, config).__name__]
    return config


def sub_configs(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(one for one in inner if one is not None)]


def other_vits(model: Any) -> list[str]:
    """The ViTs of a VLM beside the one that may carry experts, by path and class: Video-LLaVA's for videos,
    DeepSeek-VL's for high resolution.
    """
    known = [text_root(model), vision_root(model)]
    inside = {module for one in known if one is not None for module in one.modules()}
    found: list[str] = []
    for path, module in model.named_modules():
        is_vit = isinstance(module, PreTrainedModel) and module.main_input_name in PIXELS
        if is_vit and module not in inside and not set(known) & set(module.modules()):
            found.append(f"{path} ({type(module).__name__})")
            inside |= set(module.modules())
    return found


def plan_in_place(
    args: UpcycleArguments,
    asked: dict[str, dict[str, Any]],
    parent: Parent,
    processor: tuple[Any, str | None] | None = None,
) -> InPlacePlan:
    """Decides everything, from the parent's headers and configurations alone.

    Args:
        args: What was asked for.
        asked: What was asked for each part that becomes sparse.
        parent: The dense VLM.
        processor: Its processor and what that cannot read, where they are known.

    Raises:
        ValueError: for whatever the user can mend.
    """
    check_options(args, parent)
    tensors = find_native_tensors(parent)
    dense: dict[str, DenseTensors] = {parent.role: tensors}
    model: Any = tensors.model
    loaded, not_read = from_parent(parent) if processor is None else processor
    check_image_processor_named(parent.folder, loaded)
    config = sparse_config(parent, asked)
    if parts_reading_text(config):
        find_answer_tokens(loaded)  # refuses a processor whose text could not be marked
    generation = load_generation(parent, parent.config)
    sparse = build_vlm(config)
    dtype = choose_dtype(args, dense)
    for one in sub_configs(config):
        one._name_or_path = ""  # a path of this machine, which the host writes into config.json
        one.dtype = dtype
    mlps = sparse_mlps(model, sparse)
    named = {name: DenseTensor(tensors, name) for name in tensors.names}
    dropped = {parent.role: tensors.dropped}
    return InPlacePlan(
        args=args,
        parents={parent.role: parent},
        dense=dense,
        dense_tensors=named,
        dense_config=parent.config,
        config=config,
        processor=loaded,
        generation=generation,
        pixel_shape=(),
        mlps=mlps,
        mapping=map_tensors(named, mlps, sparse, dtype, dropped),
        drawing=choose_drawing(args),
        dtype=dtype,
        not_read=not_read,
        dense_vits=other_vits(model) if "vision" in asked else [],
    )
