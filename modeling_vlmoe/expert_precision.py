"""Says when a quantized model kept its experts, most of its weights, in full precision."""

import logging
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized

from .sparse_moe import Experts

logger = logging.getLogger(__name__)


def warn_of_full_experts(model: Any) -> None:
    """Warns where a quantization has left every stack of experts as it was: bitsandbytes and torchao look for
    `nn.Linear` only.
    """
    if not getattr(model, "is_quantized", False):
        return
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    stacks = [tensor for module in experts for tensor in module.parameters() if tensor.ndim == 3]
    # Packed by us, or by torchao, whose tensors are of a class of their own.
    is_packed = any(map(is_parametrized, experts)) or any(type(tensor.data) is not torch.Tensor for tensor in stacks)
    if stacks and not is_packed:
        logger.warning(
            "quantization_config reached the Linears only: the experts, %s weights, are in %s. Load with "
            "quantization_config=modeling_vlmoe.quantization.VLMoEQuantizationConfig(bits=4), or call "
            "modeling_vlmoe.quantization.quantize_experts(model, bits=8).",
            f"{sum(tensor.numel() for tensor in stacks):,}",
            stacks[0].dtype,
        )
