"""Which parameters a fine-tuning run trains, read off the configuration and the model, never "all-linear".

PEFT's "all-linear" would hit the vision tower and the connector and miss experts and routers, which are no Linears.

LoRA goes on the Linears of a layer that are not in its MLP ("attention"), on its experts' 3-D tensors ("experts")
and on the Linears of a dense MLP ("mlp"). Of delta experts, whose own parts are of low rank already, these are trained
whole, as are routers and, where asked, the connector (PEFT's `modules_to_save`). Layers of the ViT whose output the
connector never reads are left alone: they get no gradient.
"""

import logging
from collections.abc import Iterator
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_vlmoe.configuration_vlmoe import VLMoEConfig
from modeling_vlmoe.delta_experts import DeltaExperts, delta_experts, freeze_bases
from modeling_vlmoe.mlp_layouts import LINEARS
from modeling_vlmoe.modeling_in_place import is_in_place
from modeling_vlmoe.moe_config import PARTS
from modeling_vlmoe.parts import find_towers, trainable_connector_path
from modeling_vlmoe.parts_config import num_feature_layers
from modeling_vlmoe.routed_lora import is_wrapper, set_expert_dropout
from modeling_vlmoe.towers import sparse_blocks, tower_layers

from .settings import FinetuneSettings, check_lora_words, nearest
from .trained.cells import mlp_names
from .trained.methods import prepare_whole
from .trained.whole_modules import whole_modules

logger = logging.getLogger(__name__)

# Fields of PEFT's `LoraConfig` that `lora_config` works out, and the settings that say them.
OWN_FIELDS = {
    "r": "lora_r",
    "target_modules": "lora_parts and lora_targets",
    "target_parameters": "lora_parts and lora_targets",
    "modules_to_save": "train_routers, train_connector and train",
    "revision": "model_revision",
}
# What PEFT (0.21) cannot do on a stack of weights, by field: the values it can take.
FOR_EXPERTS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian"),
}


def useful_layers(model: Any, part: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a tower that reach the output, with their names in the whole model.

    Args:
        model: a model with a head, `VLMoEForConditionalGeneration` or another.
        part: "text" or "vision".

    Raises:
        ValueError: if the model has no such tower.
    """
    towers = find_towers(model)
    if part not in towers:
        raise ValueError(f"lora_parts asks for {part}, but the model has no {part} tower; leave it out.")
    where, tower = towers[part]
    path, layers = tower_layers(tower)
    num_useful = num_feature_layers(model.config) if part == "vision" else len(layers)
    prefix = f"{where}.{path}"
    for index in range(num_useful):
        yield f"{prefix}.{index}", layers[index]


def lora_modules(layer: nn.Module, targets: list[str]) -> list[str]:
    """The Linears of one layer that get LoRA, by their names in it."""
    mlps = mlp_names(layer)
    is_sparse = bool(sparse_blocks(layer))
    names = []
    for name, child in layer.named_modules():
        if not isinstance(child, LINEARS):
            continue
        kind = "attention" if name.partition(".")[0] not in mlps else "experts" if is_sparse else "mlp"
        if kind in targets and kind != "experts":
            names.append(name)
    return names


def lora_parameters(layer: nn.Module) -> list[str]:
    """The stacks of weights of a layer's experts, by their names in it (biases are vectors, not for LoRA)."""
    whole = [(path, block) for path, block in sparse_blocks(layer) if not isinstance(block.experts, DeltaExperts)]
    return [f"{path}.experts.{name}" for path, block in whole for name in block.experts.stacks]


def delta_modules(layer: nn.Module) -> list[str]:
    """What the delta experts of a layer have of their own, by their names in it."""
    return [f"{path}.deltas" for path, _ in delta_experts(layer)]


def adapted_parts(config: Any, settings: FinetuneSettings) -> list[str]:
    """The parts whose experts get LoRA: delta experts have no stacks for it."""
    if "experts" not in settings.lora_targets:
        return []
    moes = {part: config.moe(part) for part in settings.lora_parts}
    return [part for part, moe in moes.items() if moe is not None and moe.expert_type != "delta"]


def whole_connector(model: Any) -> str:
    """The path of the connector that is trained whole: our composite's, or what a host has between its towers."""
    return trainable_connector_path(model) if is_in_place(model.config) else f"{model.base_model_prefix}.connector"


def check_lora(config: Any, settings: FinetuneSettings, options: dict[str, Any] | None = None) -> None:
    """Refuses what PEFT cannot do, from the model's configuration alone.

    Args:
        config: the model's.
        settings: the recipe.
        options: further fields of PEFT's `LoraConfig`.

    Raises:
        ValueError: for unknown parts or targets, and for what cannot be done on experts.
    """
    check_lora_words(settings)
    parts = adapted_parts(config, settings)
    where = f"LoRA on experts (here: {', '.join(parts)})"
    if not parts:
        return
    for name, value in (options or {}).items():
        if name in FOR_EXPERTS and value not in FOR_EXPERTS[name]:
            takes = " or ".join(repr(known) for known in FOR_EXPERTS[name])
            raise ValueError(
                f"{name} is {value!r}, but {where} takes {takes} only in PEFT: leave {name} out, or leave experts out "
                "of lora_targets."
            )


def split_options(settings: FinetuneSettings, given: dict[str, Any]) -> tuple[FinetuneSettings, dict[str, Any]]:
    """The settings with those that were given by name, and the further fields of PEFT's `LoraConfig`.

    Raises:
        ValueError: for a name that is neither, or one that the settings say otherwise.
    """
    own = {item.name for item in fields(FinetuneSettings)}
    others = {item.name for item in fields(LoraConfig)}
    for name in given:
        if name in OWN_FIELDS:
            raise ValueError(f"{name} of LoraConfig is worked out from {OWN_FIELDS[name]}; give those.")
        if name not in own | others:
            hint = nearest([name], own | others)
            raise ValueError(f"{name} is neither a setting nor a field of PEFT's LoraConfig; leave it out.{hint}")
    settings = copy(settings)
    for name in own & given.keys():
        setattr(settings, name, given[name])
    return settings, {name: value for name, value in given.items() if name not in own}


def outline(name: str, settings: FinetuneSettings) -> PreTrainedModel:
    """A model of a folder or the Hub without its weights."""
    hub = {"revision": settings.model_revision, "trust_remote_code": settings.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **hub)
    if config.model_type != VLMoEConfig.model_type:
        raise ValueError(f"{name} is a {config.model_type} model; expected a {VLMoEConfig.model_type} one.")
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=settings.trust_remote_code)


def lora_config(
    model: PreTrainedModel | str | Path, settings: FinetuneSettings | None = None, **given: Any
) -> LoraConfig:
    """PEFT's configuration for this model: what can learn is named exactly, experts and routers too.

    >>> get_peft_model(model, lora_config(model, lora_r=8, lora_parts=["text", "vision"], use_rslora=True))
    >>> SFTTrainer("user/my-vlmoe", peft_config=lora_config("user/my-vlmoe"), ...)

    Args:
        model: the model to be wrapped, or its folder or Hub id, of which only the configuration is read.
        settings: a recipe; its defaults where there is none.
        **given: settings by name, which go before; and any other field of PEFT's `LoraConfig`.

    Raises:
        ValueError: if PEFT cannot do it, or nothing in the model matches.
    """
    settings, options = split_options(settings or FinetuneSettings(), given)
    if isinstance(model, (str, Path)):
        model = outline(str(model), settings)
    check_lora(model.config, settings, options)
    if settings.lora_dropout and (parts := adapted_parts(model.config, settings)):
        raise ValueError(
            f"lora_dropout is {settings.lora_dropout}, but LoRA on experts (here: {', '.join(parts)}) has no dropout "
            "in PEFT, and its configuration cannot hold one: leave it out, and call "
            "modeling_vlmoe.finetune.set_lora_dropout(model, ...) on the wrapped model; or leave experts out of "
            "lora_targets."
        )
    modules, parameters, whole = [], [], []
    for part in settings.lora_parts:
        for prefix, layer in useful_layers(model, part):
            modules += [f"{prefix}.{name}" for name in lora_modules(layer, settings.lora_targets)]
            if "experts" in settings.lora_targets:
                parameters += [f"{prefix}.{name}" for name in lora_parameters(layer)]
                whole += [f"{prefix}.{name}" for name in delta_modules(layer)]
            if settings.train_routers:
                whole += [f"{prefix}.{path}.router" for path, _ in sparse_blocks(layer)]
    if settings.train_connector:
        whole.append(whole_connector(model))
    if settings.train:
        whole += whole_modules(model, settings.train, [*modules, *parameters], whole)
    check_layouts(model, modules, parameters)
    if not modules and not parameters:
        deltas = [name for name in whole if name.endswith(".deltas")]
        why = " Delta experts are trained whole, and PEFT wants a target beside them: add attention." if deltas else ""
        raise ValueError(
            f"lora_targets {settings.lora_targets} match nothing in the parts {settings.lora_parts} of this model; "
            f"choose others.{why}"
        )
    cast(Any, model.base_model).warns_of_adapters = False  # the settings say what is trained
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules or [],
        target_parameters=parameters or None,
        modules_to_save=whole or None,
        revision=settings.model_revision,
        **options,
    )


def check_layouts(model: PreTrainedModel, modules: list[str], parameters: list[str]) -> None:
    """Refuses transposed Linears (`Conv1D`) beside experts: PEFT (0.21) has one `fan_in_fan_out` for both.

    Raises:
        ValueError: naming one of them, and the ways out.
    """
    transposed = [name for name in modules if isinstance(model.get_submodule(name), Conv1D)]
    if transposed and parameters:
        raise ValueError(
            f"{transposed[0]} is a Conv1D, whose weight is stored transposed, and PEFT cannot have LoRA on such "
            'and on experts in one adapter. Choose lora_targets=["experts"] or lora_targets=["attention"].'
        )


def freeze_but_connector(model: PreTrainedModel) -> None:
    """Freezes all but the connector, with its router and experts where it is sparse."""
    model.requires_grad_(False)
    model.get_submodule(whole_connector(model)).requires_grad_(True)
    freeze_bases(model)


def set_loss_weights(config: Any, balance: float | None, z: float | None) -> None:
    """Writes the router losses' weights where the model reads them; None leaves what is there."""
    for part in PARTS:
        if (moe := config.moe(part)) is not None:
            moe.router_aux_loss_coef = moe.router_aux_loss_coef if balance is None else balance
            moe.router_z_loss_coef = moe.router_z_loss_coef if z is None else z
    config.check_experts()


def prepare_model(model: PreTrainedModel, settings: FinetuneSettings) -> PreTrainedModel | PeftModel:
    """The model with exactly the recipe's parameters trainable.

    Returns:
        The model itself for `align`, `delta` and `full`, a `PeftModel` around it for `lora`.

    Raises:
        ValueError: for what cannot be trained, by name.
    """
    set_loss_weights(model.config, settings.router_aux_loss_coef, settings.router_z_loss_coef)
    if settings.method == "align":
        freeze_but_connector(model)
        return model
    if settings.method != "lora":
        prepare_whole(model, settings)
        return model
    dropout = settings.lora_dropout if adapted_parts(model.config, settings) else 0.0
    given: dict[str, Any] = {"lora_dropout": 0.0} if dropout else {}
    wrapped = cast(PeftModel, get_peft_model(model, lora_config(model, settings, **given)))
    if dropout:
        set_lora_dropout(wrapped, dropout)
    return wrapped


def set_lora_dropout(model: nn.Module, probability: float) -> None:
    """Sets the dropout of every LoRA adapter around a model, on experts too, for which PEFT's configuration has none.

    It is a setting of the run: the saved adapter does not hold it.

    Args:
        model: the model that PEFT has wrapped.
        probability: from 0 to below 1.

    Raises:
        ValueError: for another probability, or where no experts are adapted.
    """
    set_expert_dropout(model, probability)
    for module in model.modules():
        if isinstance(module, LoraLayer) and not is_wrapper(module):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(probability) if probability else nn.Identity()
