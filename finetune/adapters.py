"""Which parameters a fine-tuning run trains, read off the configuration and the model, never "all-linear".

PEFT's "all-linear" would hit the vision tower and the connector and miss experts and routers, which are no Linears.

LoRA goes on the Linears of a layer that are not in its MLP ("attention"), on its experts' 3-D tensors ("experts")
and on the Linears of a dense MLP ("mlp"). Routers and, where asked, the connector are trained whole (PEFT's
`modules_to_save`). Layers of the ViT whose output the connector never reads are left alone: they get no gradient.
"""

import logging
from collections.abc import Iterator
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from modeling_vlmoe.configuration_vlmoe import PARTS, num_feature_layers
from modeling_vlmoe.mlp_layouts import MLP_NAMES
from modeling_vlmoe.towers import sparse_blocks, tower_layers

from .settings import FinetuneSettings

logger = logging.getLogger(__name__)

TOWERS = {"text": "language_model", "vision": "vision_tower"}


def useful_layers(model: Any, part: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a tower that reach the output, with their names in the whole model.

    Args:
        model: a model with a head, `VLMoEForConditionalGeneration` or another.
        part: "text" or "vision".
    """
    tower = getattr(model.base_model, TOWERS[part])
    path, layers = tower_layers(tower)
    num_useful = num_feature_layers(model.config) if part == "vision" else len(layers)
    prefix = f"{model.base_model_prefix}.{TOWERS[part]}.{path}"
    for index in range(num_useful):
        yield f"{prefix}.{index}", layers[index]


def _mlp_name(layer: nn.Module) -> str | None:
    """The attribute of a layer that holds its MLP, dense or sparse."""
    return next((name for name in MLP_NAMES if isinstance(getattr(layer, name, None), nn.Module)), None)


def lora_modules(layer: nn.Module, targets: list[str]) -> list[str]:
    """The Linears of one layer that get LoRA, by their names in it."""
    mlp = _mlp_name(layer)
    is_sparse = bool(sparse_blocks(layer))
    names = []
    for name, child in layer.named_modules():
        if not isinstance(child, nn.Linear):
            continue
        kind = "attention" if mlp is None or name.partition(".")[0] != mlp else "experts" if is_sparse else "mlp"
        if kind in targets and kind != "experts":
            names.append(name)
    return names


def lora_parameters(layer: nn.Module) -> list[str]:
    """The stacks of weights of a layer's experts, by their names in it (biases are vectors, not for LoRA)."""
    return [
        f"{path}.experts.{name}"
        for path, block in sparse_blocks(layer)
        for name, parameter in block.experts.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def check_lora(config: Any, settings: FinetuneSettings) -> None:
    """Refuses what PEFT cannot do, from the model's configuration alone.

    Raises:
        ValueError: for dropout on experts.
    """
    sparse = [part for part in settings.lora_parts if config.moe(part) is not None]
    if settings.lora_dropout and sparse and "experts" in settings.lora_targets:
        raise ValueError(
            f"lora_dropout is {settings.lora_dropout}, but LoRA on experts (here: {', '.join(sparse)}) has no dropout "
            "in PEFT: set lora_dropout=0, or leave experts out of lora_targets."
        )


def lora_config(model: PreTrainedModel, settings: FinetuneSettings) -> LoraConfig:
    """PEFT's configuration of a recipe for this model.

    Args:
        model: the model to be wrapped.
        settings: the recipe.

    Raises:
        ValueError: if PEFT cannot do it, or nothing in the model matches.
    """
    check_lora(model.config, settings)
    modules, parameters, whole = [], [], []
    for part in settings.lora_parts:
        for prefix, layer in useful_layers(model, part):
            modules += [f"{prefix}.{name}" for name in lora_modules(layer, settings.lora_targets)]
            if "experts" in settings.lora_targets:
                parameters += [f"{prefix}.{name}" for name in lora_parameters(layer)]
            if settings.train_routers:
                whole += [f"{prefix}.{path}.router" for path, _ in sparse_blocks(layer)]
    if settings.train_connector:
        whole.append(f"{model.base_model_prefix}.connector")
    if not modules and not parameters:
        raise ValueError(
            f"lora_targets {settings.lora_targets} match nothing in the parts {settings.lora_parts} of this model; "
            "choose others."
        )
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=modules or [],
        target_parameters=parameters or None,
        modules_to_save=whole or None,
        revision=settings.model_revision,
    )


def freeze_but_connector(model: PreTrainedModel) -> None:
    """Freezes all but the connector, with its router and experts where it is sparse."""
    model.requires_grad_(False)
    model.base_model.connector.requires_grad_(True)


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
        The model itself for `align`, a `PeftModel` around it for `lora`.
    """
    set_loss_weights(model.config, settings.router_aux_loss_coef, settings.router_z_loss_coef)
    if settings.method == "align":
        freeze_but_connector(model)
        return model
    return cast(PeftModel, get_peft_model(model, lora_config(model, settings)))
