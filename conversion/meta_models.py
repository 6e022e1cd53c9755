"""Models without weights: built on the meta device for their names and shapes, or with parameters mapped from files.

A mapped model holds no weights of its own: what a Linear, an embedding or a stack of experts reads stays in the files
(`mapped_maths` knows how to compute with it), only small tensors (norms, biases, convolutions) are cast into memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import deepspeed

from modeling_vlmoe import VLMoEForConditionalGeneration
from modeling_vlmoe.delta_experts import DeltaExperts
from modeling_vlmoe.modeling_in_place import is_in_place, sparse_class_of
from modeling_vlmoe.sparse_moe import Experts
from modeling_vlmoe.text_gate import silence

FEWEST_MAPPED = 2**22  # numbers of an embedding

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def whole_models() -> Iterator[None]:
    """Within it models are built and loaded whole, also in a run under DeepSpeed's ZeRO-3: there each would be split,
    and wait until every process builds it.
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    config = None if held is None else held()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def build_on_meta(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Builds a model of float32 parameters that take no memory."""
    with whole_models(), torch.device("meta"), init.meta_device_safe_creation_ops(), init.no_init_weights():
        return build().eval()


def build_vlm(config: Any) -> PreTrainedModel:
    """The vision-language model of a configuration of ours, on the meta device: our composite, or a host's VLM that is
    sparse in place.
    """
    model_class: Any = VLMoEForConditionalGeneration
    if is_in_place(config):
        model_class = sparse_class_of(model_class, config)
    return build_on_meta(lambda: model_class(config))


def in_float32(config: PreTrainedConfig) -> Any:
    """A configuration whose towers are built in float32 too: they have buffers in the dtype that it names (Gemma-3's
    scale of embeddings), which are computed, and not read.
    """
    config = copy.deepcopy(config)
    for one in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if one is not None:
            one.dtype = torch.float32
    return config


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Which parameters have no tensor of their own, and the name of the one they share."""
    return dict(model.all_tied_weights_keys)


def target_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this model, in its order; a tied tensor is stored once."""
    tied = tied_names(model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def is_mapped(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter may stay in its file, because it is only read through a matrix product or by rows.

    A small embedding goes into memory: ViTs interpolate theirs of positions past the module (SigLIP2).
    """
    if isinstance(module, nn.Embedding):
        return parameter.numel() >= FEWEST_MAPPED
    return (type(module) is nn.Linear and name == "weight") or (
        isinstance(module, DeltaExperts) or (isinstance(module, Experts) and parameter.ndim == 3)
    )


def computed_buffers(model: PreTrainedModel) -> None:
    """Gives buffers that no checkpoint holds (rotary frequencies, position ids) their values, by the model's init."""
    owners: dict[str, PreTrainedModel] = {}
    holders: dict[int, PreTrainedModel] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        owners[path] = module if isinstance(module, PreTrainedModel) else owners[parent]
        names = module._non_persistent_buffers_set & {
            name for name, buffer in module._buffers.items() if buffer is not None
        }
        for name in names:
            setattr(module, name, torch.empty_like(module._buffers[name], device="cpu"))
        if names:
            owners[path]._init_weights(module)
            holders[id(owners[path])] = owners[path]
    for holder in holders.values():  # some models give their layers' buffers values as a whole (Falcon-H1)
        holder._init_weights(holder)


def patch_embeddings(model: nn.Module) -> set[nn.Module]:
    """The Linears that a ViT embeds patches by: it casts pixels to their dtype (SigLIP2), so they are not mapped."""
    found = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                found.add(module.get_input_embeddings())
            except NotImplementedError:
                continue  # a ViT that does not say so
    return {module for module in found if type(module) is nn.Linear}


@torch.no_grad()
def fill_mapped(model: Model, tensor: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> Model:
    """Gives a meta model its weights. Its text gates are silent: proofs run parts without the text around them.

    Args:
        model: A model built by `build_on_meta`, or a module of one.
        tensor: Gives the stored tensor of a name.
        dtype: Round small tensors to this dtype first; `mapped_maths(dtype)` does so with the mapped ones.
    """
    tied, in_memory = {}, patch_embeddings(model)
    if isinstance(model, PreTrainedModel):
        tied = tied_names(model)
        computed_buffers(model)
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                stored = tensor(tied.get(prefix + name, prefix + name))
                stays = is_mapped(module, name, stored) and module not in in_memory
                value = stored if stays else stored.to(dtype).to(torch.float32)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                setattr(module, name, tensor(prefix + name))
    silence(model)
    return model
