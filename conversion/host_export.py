"""From a host's VLM that is sparse in place to a plan of its native sibling. Nothing is written yet."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_vlmoe.delta_experts import refuse_delta_config
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.parts import blocks_of

from .assignments import EXPERTS
from .dense_tensors import DenseTensors, find_dense_tensors, head_name
from .export_plan import IMAGE_PARTS, ExportPlan, check_no_text_gate, describe_experts, obstacles, text_names
from .host_mapping import EqualCopies, HostMapping, StoredNames, check_total, text_prefix
from .host_planning import sub_configs
from .host_processors import copy_processor, load_processor
from .host_targets import build_native_host, dense_values, host_config, host_text_config, is_tied, text_part
from .mapping import SparseMLP, sparse_mlps
from .meta_models import build_on_meta
from .native_arguments import LLAVA, NATIVE, TEXT, ExportArguments
from .native_mapping import Names, all_equal
from .native_processor import native_tokenizer
from .native_targets import Pair, dense_layers
from .native_tensors import AUTO_CLASSES
from .parents import Parent
from .plans import load_generation

# The tensors of experts that are stacked; what else they hold they share.
STACKS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


@dataclass
class HostExportPlan(ExportPlan):
    """A plan for a VLM that is sparse in place.

    Attributes:
        not_read: What the processor cannot read on this machine, and so is not proved; None where it reads all.
    """

    not_read: str | None = None

    @property
    def not_proved(self) -> str | None:
        """Videos, where the processor cannot read them."""
        return self.not_read if self.args.to != TEXT else None

    @property
    def equal_layers(self) -> list[int]:
        """Dense layers of the LLM that are written as equal experts."""
        if self.pair is None or self.pair.sparse.has_dense_layers:
            return []
        return dense_layers(text_part(self.config))

    @property
    def summary(self) -> str:
        """What becomes of what."""
        config, native = self.config, self.native
        if self.args.to == TEXT:
            return f"the LLM of a {config.body_model_type}, sparse in place, becomes a {native.model_type}"
        text = native.get_text_config().model_type
        return f"{config.body_model_type}, sparse in place, becomes {native.model_type} around {text}"


@dataclass(frozen=True)
class ProcessorFiles:
    """A processor that is written as it lies in its folder.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    def save_pretrained(self, folder: Path) -> None:
        """Copies its files."""
        copy_processor(self.folder, folder)


def is_as_wide(tensors: DenseTensors, mlp: SparseMLP, dense: Any) -> bool:
    """Whether experts are as wide as the dense MLP whose place they have."""
    down = dense.get_parameter(f"{mlp.path if mlp.source is None else mlp.source}.{mlp.layout.down}.weight")
    return prod(tensors.shape(f"{mlp.path}{EXPERTS}down_proj")[1:]) == down.numel()


def equal_copies(tensors: DenseTensors, config: Any) -> list[EqualCopies]:
    """The experts of the ViT and the connector, which are to be copies of one dense MLP each.

    Args:
        tensors: The checkpoint's tensors; those of experts are compared.
        config: Its configuration.

    Raises:
        ValueError: naming those that no dense MLP can replace, and why.
    """
    parts = [part for part in IMAGE_PARTS if config.moe(part) is not None]
    if not parts:
        return []
    check_no_text_gate(config)
    dense_config = config.dense_class.from_dict(dense_values(config))
    dense = build_on_meta(lambda: AutoModelForImageTextToText.from_config(dense_config))
    mlps, found, refused = sparse_mlps(dense, tensors.model), [], []
    for part in parts:
        own = [mlps[path] for path, _ in blocks_of(tensors.model, {part})]
        stacks = [name for name in tensors.names if name.startswith(tuple(mlp.path + EXPERTS for mlp in own))]
        is_wide = all(is_as_wide(tensors, mlp, dense) for mlp in own)
        are_equal = all(all_equal(tensors.tensor(name)) for name in stacks if name.rpartition(EXPERTS)[2] in STACKS)
        reasons = obstacles(config.moe(part), are_equal, is_wide)
        if reasons:
            refused.append(f"those of {describe_experts(config, part)} {' and '.join(reasons)}")
        found += [EqualCopies(mlp) for mlp in own]
    if refused:
        raise ValueError(
            f"No native VLM has experts in the ViT or the connector, and {'; '.join(refused)}: they cannot be "
            "exported without loss. Choose --to text, the LM alone, where transformers has one, or use the "
            "checkpoint with vlmoe's own code."
        )
    return found


def check_form(args: ExportArguments, given: str, body: str) -> None:
    """Refuses what is meant for our own composite.

    Raises:
        ValueError: naming it.
    """
    if args.to == LLAVA:
        raise ValueError(
            f"--to {LLAVA} is given, but {given} is a {body} that is sparse in place, and no LLaVA. Choose --to "
            f"{NATIVE}, the {body} in transformers' own classes, or --to {TEXT}, the LM alone."
        )


def native_text(config: Any) -> tuple[Pair | None, PreTrainedConfig]:
    """The configuration of the LM alone, and the pair it is written by.

    Raises:
        ValueError: when transformers has no causal LM for it, or it cannot be written.
    """
    pair, text = host_text_config(config)
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"--to {TEXT} is given, but transformers has no causal LM for the {text.model_type} of this "
            f"{config.body_model_type}: its LLM exists inside the VLM alone. Choose --to {NATIVE}."
        )
    text.tie_word_embeddings = is_tied(config)
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    return pair, text


def plan_host_export(args: ExportArguments, source: Parent) -> HostExportPlan:
    """Decides everything; experts of ViT and connector are read, to see whether they are equal.

    Raises:
        ValueError: for whatever cannot be written without loss, naming it.
    """
    refuse_delta_config(source.config, "vlmoe export", ("text",) if args.to == TEXT else PARTS)
    tensors = find_dense_tensors(source)
    model: Any = tensors.model
    config = model.config
    check_form(args, source.given, config.body_model_type)
    processor, not_read = load_processor(source.folder, source.given, config.body_model_type)
    prefix = text_prefix(model)
    fields: dict[str, Any] = {"text_prefix": prefix}
    companions: list[Any] = [ProcessorFiles(source.folder)]
    if args.to == TEXT:
        pair, native = native_text(config)
        names, companions = text_names(native), [native_tokenizer(processor)]
        written = build_on_meta(lambda: AUTO_CLASSES["text"].from_config(native))
    else:
        pair, native = host_config(config)
        written = build_native_host(native)
        names = Names(text_prefix(written), str(head_name(written)), "", "")
        fields |= {"stored": StoredNames(written), "copies": equal_copies(tensors, config)}
    dtype = tensors.dtype(embedding_name(model))
    for one in sub_configs(native):
        one.dtype, one._name_or_path = dtype, ""
    mapping = HostMapping(tensors, text_part(config), pair, names, {}, dtype, **fields).build()
    check_total(mapping, written)
    return HostExportPlan(
        args=args,
        source=source,
        tensors=tensors,
        config=config,
        processor=processor,
        pixel_shape=(),
        pair=pair,
        native=native,
        companions=companions,
        generation=load_generation(source, config),
        mapping=mapping,
        forms={},
        not_read=not_read,
    )


def embedding_name(model: Any) -> str:
    """The name of the weight of the embedding of tokens."""
    wanted = model.get_input_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)
