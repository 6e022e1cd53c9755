"""A model as a recipe trains it, without its weights: its tensors have shapes and dtypes and no numbers.

It is the real model, by its own code and PEFT's, so that nothing is known twice of what a recipe trains. Its tensors
are torch's `FakeTensor`s, which say that they are on a CPU; small tensors of numbers (token ids, sizes of images) go
in as they are.
"""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from modeling_vlmoe import VLMoEConfig
from modeling_vlmoe.conversion.host_parents import host_values, is_host
from modeling_vlmoe.conversion.meta_models import build_vlm

from .adapters import check_lora, prepare_model
from .arguments import FinetuneArguments
from .checkpoints import load_base_config
from .hollow_operations import make_hollow
from .trained.packing import check_packable


def load_any_config(args: FinetuneArguments) -> Any:
    """The configuration of a model to plan for: a vlmoe one, or a dense VLM of transformers', as if it had no experts.

    Raises:
        ValueError: if it is another.
    """
    config = load_base_config(args.model, **args.hub)
    if config.model_type == VLMoEConfig.model_type:
        return config
    if not is_host(config):
        raise ValueError(
            f"model {args.model} is a {config.model_type} model; expected a vlmoe one, or a VLM that `vlmoe upcycle "
            "--vlm-model` leaves in its own class. Make a vlmoe one of it first: vlmoe upcycle, with --dense for one "
            "without experts."
        )
    return VLMoEConfig.from_dict(host_values(config))


def model_dtype(config: Any, dtype: str) -> torch.dtype:
    """The dtype that a model is loaded in, as a recipe says it."""
    saved = config.dtype or torch.float32
    chosen = saved if dtype == "auto" else dtype
    return chosen if isinstance(chosen, torch.dtype) else getattr(torch, str(chosen).removeprefix("torch."))


def build_hollow(config: Any, args: FinetuneArguments, mode: FakeTensorMode) -> tuple[nn.Module, set[str]]:
    """The model that a recipe trains, without numbers.

    Args:
        config: the model's.
        args: the recipe.
        mode: whose tensors it gets.

    Returns:
        The model, in training, and the names of what PEFT has added to it.
    """
    if args.method == "lora":
        check_lora(config, args)
    check_packable(config, args)
    config = copy.deepcopy(config)
    dtype = model_dtype(config, args.dtype)
    model = build_vlm(config)
    model.tie_weights()
    if args.experts_implementation is not None:
        model.set_experts_implementation(args.experts_implementation)
    own = set()
    for parameter in model.parameters():
        own.add(id(parameter))
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT (0.21) asks transformers by a deprecated name
        prepared: nn.Module = prepare_model(model, args)
    added = {name for name, parameter in prepared.named_parameters() if id(parameter) not in own}
    make_hollow(prepared, mode)
    if args.activation_checkpointing:
        given: dict[str, Any] = dict(args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
        beside = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}  # as the Trainer
        prepared.activation_checkpointing_enable(activation_checkpointing_kwargs=given or None, **beside)  # type: ignore[operator]
    return prepared.train(), added
