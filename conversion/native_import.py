"""A native sparse LM and a ViT, or a LLaVA, in; a vlmoe model with the same experts out.

>>> parents = {"text_model": "Qwen/Qwen3-30B-A3B", "vision_model": "google/siglip-base-patch16-224"}
>>> import_native(ImportArguments(**parents, output_dir="out"))
PosixPath('out')
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, register
from modeling_vlmoe.mlp_layouts import LAYOUTS

from .assignments import EXPERTS, Assignment, DenseTensor, Drawing
from .connector_init import DrawnConnector
from .dense_tensors import DenseTensors, find_dense_tensors
from .llava_parents import check_llava_head, is_llava, vlmoe_fields
from .mapping import PART_PREFIX, Mapping, SparseMLP, vocabulary_modules
from .meta_models import build_on_meta, target_shapes
from .native_arguments import ImportArguments
from .native_targets import SPARSE_FAMILIES, from_native, is_native_sparse
from .native_tensors import NativeTensors, find_native_tensors
from .output_folder import check_output_folder, check_parents_survive
from .parents import Parent, check_vision, commit_of, find_folder, read_config
from .planning import build_config, name_in_vlm
from .plans import UpcyclePlan, choose_dtype, load_generation
from .processors import build_processor
from .proved_writing import write_proved
from .streaming import CheckpointReader, TensorSpec
from .summaries import summarise

ROLES = ("text", "vision", "vlm")
SHARED = ".mlp.shared_expert"


class ImportPlan(UpcyclePlan):
    """What an import decides; its parents are sparse already."""

    claim = "The imported model is not its parents"
    is_lossy = False  # experts are routed as their parents route them


def import_native(args: ImportArguments) -> Path:
    """Writes a vlmoe model that computes what its native parents compute.

    It is written into a temporary folder beside the output, proved there against the parents, and moved into place;
    whatever fails leaves nothing behind.

    Args:
        args: What to make of what.

    Returns:
        The output folder.

    Raises:
        ValueError: for whatever the user can mend.
        ProofError: a ValueError, when the result does not compute what the parents compute.
        OSError: when the disk is full.
    """
    if args.dry_run:
        raise ValueError("dry_run is set, but import_native() writes; preview_import() says what would be written.")
    if args.output_dir is None:
        raise ValueError("Give --output-dir, the folder of the model.")
    output = Path(args.output_dir).expanduser()
    return write_proved(prepare_import(args), output, args.force)


def prepare_import(args: ImportArguments) -> ImportPlan:
    """The plan, once the output folder (where one is named) is known to be free."""
    register()
    output = None if args.output_dir is None else Path(args.output_dir).expanduser()
    if output is not None:
        check_output_folder(output, args.force)
    plan = plan_import(args)
    if output is not None:
        for parent in plan.parents.values():
            check_parents_survive(output, [parent.folder, *parent.reader.files])
    return plan


def preview_import(args: ImportArguments) -> str:
    """What `import_native` would write, for people; nothing is written, and no output folder need be named.

    Raises:
        ValueError: as `import_native` would.
    """
    plan = prepare_import(args)
    return summarise(plan.mapping, draws_connector="vlm" not in plan.parents)


def open_native_parents(args: ImportArguments) -> dict[str, Parent]:
    """Opens the parents that the arguments name: `text` and `vision`, or `vlm`.

    Raises:
        ValueError: when they are not named as one of these, or are of another kind.
    """
    given = {role: getattr(args, f"{role}_model") for role in ROLES}
    named = {role for role in ROLES if given[role] is not None}
    if named not in ({"text", "vision"}, {"vlm"}):
        raise ValueError(
            "Give --text-model and --vision-model, or --vlm-model alone; "
            f"given: {', '.join(f'--{role}-model' for role in ROLES if role in named) or 'none'}."
        )
    parents = {}
    for role in (role for role in ROLES if role in named):
        folder = find_folder(given[role], role, getattr(args, f"{role}_revision"))
        config = read_config(folder)
        CHECKS[role](given[role], config)
        parents[role] = Parent(role, given[role], folder, commit_of(folder), config, CheckpointReader(folder))
    return parents


def check_sparse_text(given: str, config: PreTrainedConfig) -> None:
    """A text parent is a sparse LM in the table."""
    if not is_native_sparse(config):
        raise ValueError(
            f"--text-model {given} is a {config.model_type} model; expected one of {', '.join(SPARSE_FAMILIES)}. A "
            "dense LLM is made sparse by `vlmoe upcycle`."
        )


def check_llava(given: str, config: Any) -> None:
    """A vlm parent is a LLaVA, with a bare head."""
    if not is_llava(config):
        raise ValueError(
            f"--vlm-model {given} is a {config.model_type} model; expected a llava one. Of another VLM the sparse LLM "
            "is no part that could be taken over: such a VLM is made sparse in place, from its dense checkpoint, by "
            "`vlmoe upcycle`. Separate parents are given as --text-model and --vision-model."
        )
    check_llava_head(given, config)


CHECKS = {"text": check_sparse_text, "vision": check_vision, "vlm": check_llava}


def build_imported_config(args: ImportArguments, parents: dict[str, Parent]) -> tuple[VLMoEConfig, Any]:
    """The configuration that means the same as the parents', and the native LLM's.

    Raises:
        ValueError: when ours lacks something, or an option is given for a LLaVA, which says it itself.
    """
    choices = {name: getattr(args, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
    given = {name: value for name, value in choices.items() if value is not None}
    llava: Any = parents["vlm"].config if "vlm" in parents else None
    if llava is not None and given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags} is given, but {parents['vlm'].given} says what its connector reads; leave it out.")
    native = parents["text"].config if llava is None else llava.text_config
    text, moe = from_native(native) if is_native_sparse(native) else (copy.deepcopy(native), None)
    fields: dict[str, Any] = {"text_config": text.to_dict(), "text_moe": moe, **given}
    if llava is None:
        fields["vision_config"] = parents["vision"].tower_config.to_dict()
    else:
        fields |= vlmoe_fields(llava, text)
    return VLMoEConfig(**fields), native


def idle_shared_experts(tensors: NativeTensors) -> bool:
    """Whether all shared experts of an LM add nothing, whatever they are given."""
    downs = [name for name in tensors.names if name.endswith(f"{SHARED}.down_proj.weight")]
    return bool(downs) and not any(tensors.tensor(name).any() for name in downs)


def imported_names(dense: dict[str, DenseTensors]) -> dict[str, tuple[DenseTensors, str]]:
    """All parents' tensors by their names in the vlmoe model."""
    named = {}
    for role, tensors in dense.items():
        for name in tensors.names:
            ours = name_in_vlm(role, name, tensors.model)
            named[ours.replace(".mlp.gate.weight", ".mlp.router.weight")] = (tensors, name)
    return named


def map_imported(
    dense: dict[str, DenseTensors], model: Any, config: Any, args: ImportArguments, dtype: torch.dtype, is_idle: bool
) -> Mapping:
    """Assigns every tensor of the parents to a target, and every target what fills it.

    Raises:
        ValueError: for a tensor that no target uses, and for a target that nothing fills.
    """
    named = imported_names(dense)
    dropped = {role: dict(tensors.dropped) for role, tensors in dense.items()}
    if is_idle:
        for ours in [name for name in named if SHARED in name]:
            tensors, name = named.pop(ours)
            dropped[tensors.parent.role][name] = "of a shared expert of zeros, which adds nothing"
    growable = {f"{name}.weight" for name in vocabulary_modules(model)}
    shapes = target_shapes(model)
    drawn = {name: shape for name, shape in shapes.items() if name.startswith(PART_PREFIX["connector"])}
    connector = DrawnConnector(drawn, args.seed, config.initializer_range, dtype)
    assignments = []
    for target, shape in shapes.items():
        if target in named:
            assignments.append(assign_imported(target, shape, *named.pop(target), config, dtype, target in growable))
        elif target in drawn and "vlm" not in dense:
            assignments.append(Assignment(TensorSpec(target, dtype, shape), "copy", (DenseTensor(connector, target),)))
        else:
            raise ValueError(f"Nothing in the parents fills {target} of the vlmoe model. Add it.")
    if named:
        raise ValueError(
            f"The vlmoe model has no place for {len(named)} tensors: {', '.join(sorted(named)[:5])}. Leave them out."
        )
    return Mapping(assignments, dropped)


def assign_imported(
    target: str,
    shape: tuple[int, ...],
    tensors: DenseTensors,
    name: str,
    config: Any,
    dtype: torch.dtype,
    is_growable: bool,
) -> Assignment:
    """The assignment of one target.

    Raises:
        ValueError: when what would fill it has another shape.
    """
    reader, moe = tensors.parent.reader, config.text_moe
    pieces = tensors.pieces(name) if isinstance(tensors, NativeTensors) else [tensors.stored[name]]
    sources = tuple(DenseTensor(reader, key) for key in pieces)
    kept = tensors.dtype(name)
    spec = TensorSpec(target, dtype if kept.is_floating_point else kept, shape)
    if target.endswith(".router.weight"):
        spec = TensorSpec(target, torch.float32, shape)
    if is_growable and tensors.shape(name)[0] < shape[0]:
        return Assignment(spec, "grow", sources)
    if tensors.shape(name) != shape:
        raise ValueError(
            f"{target} has the shape {shape} in the vlmoe model, but {tensors.shape(name)} in its parent. Check that "
            "the parent's weights and config.json belong together."
        )
    if EXPERTS in target:
        return Assignment(spec, "stack", sources, (), moe.num_experts, moe.num_experts_per_tok)
    return Assignment(spec, "copy", sources)


def plan_import(args: ImportArguments) -> ImportPlan:
    """Decides everything, from the parents' headers and configurations.

    Raises:
        ValueError: for whatever the user can mend.
    """
    parents = open_native_parents(args)
    dense = {
        role: find_dense_tensors(parent) if role == "vision" else find_native_tensors(parent)
        for role, parent in parents.items()
    }
    parents_config, _ = build_imported_config(args, parents)
    lm: Any = dense.get("text") or dense["vlm"]
    if is_idle := idle_shared_experts(lm):
        parents_config.text_moe.shared_expert_intermediate_size = None
        parents_config.text_moe.num_shared_experts = 0
    meta = build_on_meta(lambda: VLMoEForConditionalGeneration(copy.deepcopy(parents_config)))
    processor, pixel_shape = build_processor(parents, meta)
    config: Any = build_config(parents_config, {}, processor)
    generation = load_generation(lm.parent, config)
    model: Any = build_on_meta(lambda: VLMoEForConditionalGeneration(config))
    dtype = choose_dtype(args, dense)  # type: ignore[arg-type]
    for one in (config, config.text_config, config.vision_config):
        one.dtype = dtype
    mapping = map_imported(dense, model, config, args, dtype, is_idle)
    whole = {one.spec.name: one.dense[0] for one in mapping.assignments if len(one.dense) == 1}
    return ImportPlan(
        args=args,  # type: ignore[arg-type]
        parents=parents,
        dense=dense,
        dense_tensors=whole,
        dense_config=parents_config,
        config=config,
        processor=processor,
        generation=generation,
        pixel_shape=pixel_shape,
        mlps=imported_mlps(model),
        mapping=mapping,
        drawing=Drawing("kept", "kept", args.seed),
        dtype=dtype,
    )


def imported_mlps(model: Any) -> dict[str, SparseMLP]:
    """The LLM's sparse blocks by their paths, for the proof."""
    moe = model.config.text_moe
    paths = [] if moe is None else [f"{PART_PREFIX['text']}layers.{index}.mlp" for index in moe.layers]
    return {path: SparseMLP(path, LAYOUTS[0], False, moe.num_experts, moe.num_experts_per_tok) for path in paths}
