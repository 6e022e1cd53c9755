"""Any dense VLM of transformers, sparse in place: its own class, with experts where the MLPs of its parts were.

A class derived from the host's builds the dense model, then turns its towers into their sparse classes and puts
experts into its connector. Processor, tiling, video, positions and `generate` are the host's. One class is made per
class of the host's, from the installed transformers.

    >>> model = AutoModelForImageTextToText.from_pretrained("qwen2_5_vl-moe")
    >>> type(model).__name__, isinstance(model, Qwen2_5_VLForConditionalGeneration)
    ('SparseQwen2_5_VLForConditionalGeneration', True)
"""

import inspect
from functools import wraps
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin, PreTrainedModel
from transformers.models.auto import modeling_auto

from .checkpoint_folder import CheckpointFolder
from .configuration_in_place import BODY, body_config_class, sparse_config_class
from .fsdp_plan import wrap_vision_layers
from .host_generation import EncodesWithText
from .host_images import MARKS, check_known
from .image_tokens import check_tells_images
from .moe_config import part_config
from .parts import find_connector, find_towers, has_layers, write_text_width
from .parts_config import AUTO_MAP
from .recorders import install_recorders, make_recorders_picklable
from .routed_pass import run_routed
from .routers import ROUTER_WEIGHTS
from .routing import RoutedModel
from .sparse_moe import SparseMoE
from .towers import (
    init_sparse_weights,
    make_sparse,
    sparse_tower_class,
)

# Where remote code is looked for: the file that reaches all others (see parts_config.AUTO_MAP).
HOME = f"{__name__.rpartition('.')[0]}.modeling_vlmoe"
_SPARSE_MODELS: dict[type, Any] = {}


def is_in_place(config: Any) -> bool:
    """Whether a configuration, or its JSON values, is that of a host's VLM that is sparse in place."""
    found = config.get(BODY) if isinstance(config, dict) else getattr(config, BODY, None)
    return found is not None


def dense_class_of(config: Any, table: str) -> Any:
    """The host's model class behind a configuration.

    Args:
        config: of a VLM that is sparse in place, or its JSON values.
        table: the host's table of models to look it up in.

    Raises:
        ValueError: if the host has none.
    """
    body = config[BODY] if isinstance(config, dict) else getattr(config, BODY)
    try:
        found = getattr(modeling_auto, table)[body_config_class(body)] if table else None
    except KeyError:
        found = None
    found = found[0] if isinstance(found, tuple) else found
    if found is None:
        raise ValueError(
            f"transformers has no {table.removesuffix('_MAPPING') or 'such model'} for {body}, so there is none with "
            "experts. Load it by AutoModelForImageTextToText."
        )
    return found


def register_model(head: Any, model_class: Any) -> None:
    """Has the Auto classes that give one of our composite's classes give a host's, sparse in place, for its own
    configuration: pipelines look the name of a model's class up there.
    """
    for auto_name, reference in AUTO_MAP.items():
        if reference.rpartition(".")[2] == head.__name__:
            getattr(transformers, auto_name).register(model_class.config_class, model_class, exist_ok=True)


def sparse_class_of(head: Any, config: Any) -> Any:
    """The class that one of our composite's classes stands for, given the configuration of a host's VLM.

    Raises:
        ValueError: if the host has no model of this kind.
    """
    model_class = sparse_model_class(dense_class_of(config, head.body_mapping))
    register_model(head, model_class)
    return model_class


def take_requests(config: Any) -> dict[int, str | None]:
    """The kernels that are asked for, by the configuration's identity, and forgets them there: dense classes, which
    the parts are at first, refuse them.
    """
    subs = [getattr(config, name, None) for name in config.sub_configs]
    requests = {}
    for one in (config, *(sub for sub in subs if sub is not None)):
        requests[id(one)] = one._experts_implementation
        one._experts_implementation_internal = None
    return requests


def words_width(config: Any) -> int:
    """The width of the words that a text gate reads."""
    return part_config(config, "text").hidden_size


def make_connector_sparse(model: Any) -> None:
    """Puts experts in the place of the connector's MLP, and has the model around them initialise them."""
    config, mlp = model.config, find_connector(model)
    block = SparseMoE(config, config.connector_moe, mlp.module, 1, mlp.layout, text_width=words_width(config))
    holders = [one for one in model.modules() if isinstance(one, PreTrainedModel) and mlp.layer in set(one.modules())]
    mlp.replace(block.train(model.training))
    holder = holders[-1]
    if holder not in (model, model.base_model) and not hasattr(holder, "request"):
        holder.__class__ = sparse_tower_class(type(holder))  # a ViT that merges patches behind its layers


def make_vlm_sparse(model: Any, requests: dict[int, str | None]) -> None:
    """Turns the parts of a dense VLM sparse in place, as its configuration says.

    Args:
        model: an instance of a class of `sparse_model_class`, dense yet.
        requests: the kernels that were asked for (`take_requests`).

    Raises:
        ValueError: naming the layer or module that cannot carry experts.
    """
    config, body = model.config, model.base_model
    check_known(model)
    if config.text_moe is not None:
        check_tells_images(config)
    for part, moe in (("text", config.text_moe), ("vision", config.vision_moe)):
        if moe is None:
            continue
        if part not in (towers := find_towers(model)):
            raise ValueError(
                f"{part}_moe is given, but {type(model).__name__.removeprefix('Sparse')} has no {part} tower whose "
                f"layers are known. Leave {part}_moe out."
            )
        tower = towers[part][1]
        make_sparse(tower, moe, requests.get(id(tower.config)), text_width=words_width(config))
    if config.connector_moe is not None:
        make_connector_sparse(model)
    if config.text_moe is not None:
        write_text_width(config, find_towers(model)["text"][1])
    if body is not model:
        body.__class__ = sparse_model_class(type(body))
    body.tower_paths = {part: path for part, (path, _) in find_towers(body).items()}
    for one in dict.fromkeys((body, model)):
        one.is_built = True
        one.post_init()
    config._experts_implementation_internal = model.get_correct_experts_implementation(requests[id(config)])
    install_recorders(model)


def _rebuild(dense_class: type) -> Any:
    made = sparse_model_class(dense_class)
    return made.__new__(made)


def sparse_model_class(dense_class: Any) -> Any:
    """The host's model class, with or without a head, whose parts may carry experts; one per class."""
    if dense_class in _SPARSE_MODELS:
        return _SPARSE_MODELS[dense_class]
    names = tuple(inspect.signature(dense_class.forward).parameters)[1:]

    def __init__(self, config, *args, **kwargs):
        config.check_experts()
        requests = take_requests(config)
        dense_class.__init__(self, config, *args, **kwargs)
        make_vlm_sparse(self, requests)

    def __reduce_ex__(self, protocol):
        make_recorders_picklable(self)
        return _rebuild, (dense_class,), self.__dict__

    @wraps(dense_class.forward)
    def forward(self, *args, **kwargs):
        return run_routed(self, dense_class.forward, dict(zip(names, args, strict=False)) | kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        dense_class._init_weights(self, module)
        init_sparse_weights(module, getattr(self.config, "initializer_range", 0.02))

    def init_parallel_plans(self):
        dense_class.init_parallel_plans(self)
        vision = find_towers(self).get("vision")
        if vision is not None and has_layers(vision[1]):
            wrap_vision_layers(self, *vision)

    def get_correct_experts_implementation(self, requested):
        # While the dense model is built, its inner model shares this configuration, and refuses every kernel.
        return dense_class.get_correct_experts_implementation(self, requested) if self.is_built else requested

    def _supports_mm_encoder_outputs(self):
        # `generate` encodes images before forward, where FSDP has not gathered the tower's weights yet.
        return not isinstance(self, FSDPModule) and dense_class._supports_mm_encoder_outputs(self)

    members = {
        "__module__": HOME,
        "__init__": __init__,
        # Trainer looks this name up to see how label smoothing lays labels beside logits (transformers 5.23).
        "_get_name": lambda self: dense_class.__name__,
        "__reduce_ex__": __reduce_ex__,
        "forward": forward,
        "_init_weights": _init_weights,
        "init_parallel_plans": init_parallel_plans,
        "get_correct_experts_implementation": get_correct_experts_implementation,
        "config_class": sparse_config_class(dense_class.config_class),
        "is_built": False,
        "takes_marks": MARKS in names,
        "_keep_in_fp32_modules_strict": [*(dense_class._keep_in_fp32_modules_strict or []), *ROUTER_WEIGHTS],
        # The host answers these two by searching the source file of the class.
        "_can_set_experts_implementation": classmethod(lambda cls: True),
        "_can_set_attn_implementation": classmethod(lambda cls: dense_class._can_set_attn_implementation()),
    }
    if hasattr(dense_class, "_supports_mm_encoder_outputs"):
        members["_supports_mm_encoder_outputs"] = _supports_mm_encoder_outputs
    name = f"Sparse{dense_class.__name__}"
    generates = (EncodesWithText,) if issubclass(dense_class, GenerationMixin) else ()
    _SPARSE_MODELS[dense_class] = type(name, (RoutedModel, *generates, CheckpointFolder, dense_class), members)
    return _SPARSE_MODELS[dense_class]
