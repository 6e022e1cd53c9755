"""What an upcycling is, once everything is decided, and the choices that every kind of parent has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .arguments import UpcycleArguments
from .assignments import DenseTensor, Drawing
from .dense_tensors import DenseTensors
from .expert_init import EXPERT_INITS
from .gaps import DENSE_CLAIM
from .lossy_routing import describe_lossy, lossy_parts
from .mapping import Mapping, SparseMLP
from .parents import BROKEN, Parent
from .router_init import ROUTER_INITS
from .streaming import read_json

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
    dense_config: Any
    config: Any
    processor: Any
    generation: GenerationConfig
    pixel_shape: tuple[int, ...]
    mlps: dict[str, SparseMLP]
    mapping: Mapping
    drawing: Drawing
    dtype: torch.dtype

    @property
    def is_lossy(self) -> bool:
        """Whether copies of the dense MLPs are routed so that they compute something else."""
        return bool(lossy_parts(self.config))

    @property
    def remarks(self) -> list[str]:
        """What people are told of the plan beside what becomes of which tensor."""
        return describe_lossy(self.config)

    def write_processor(self, folder: Path) -> None:
        """Writes the processor into the checkpoint."""
        self.processor.save_pretrained(folder)

    def describe_images(self) -> dict[str, Any]:
        """How images are read, for the receipt."""
        return {
            "vision_feature_layer": self.config.vision_feature_layer,
            "vision_feature_select_strategy": self.config.vision_feature_select_strategy,
            "image_token": self.processor.image_token,
            "image_token_id": self.config.image_token_id,
            "num_image_tokens": self.processor.num_image_tokens,
            "vocabulary_rows": {
                "parent": self.dense_config.text_config.vocab_size,
                "written": self.config.text_config.vocab_size,
            },
        }


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


def load_generation(parent: Parent, config: PreTrainedConfig) -> GenerationConfig:
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
