"""Weights in 8 or 4 bits, experts included.

bitsandbytes and torchao look for `nn.Linear`, so the quantization configurations of transformers leave stacked
experts, most of the model, as they are and say nothing. Here each stack is replaced by its codes, and becomes a tensor
again when its layer runs: in 4 bits by bitsandbytes (NF4, blocks of 64), in 8 bits by one scale per row of each
expert.

Invariant: routers keep their precision (a rounded router sends tokens elsewhere), and so do the parts not named.

    >>> config = VLMoEQuantizationConfig(bits=4)
    >>> model = AutoModelForImageTextToText.from_pretrained("tuned/merged", quantization_config=config)
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from .delta_experts import DeltaExperts, refuse_delta_experts
from .moe_config import PARTS
from .packed_adapters import guard, settle_adapters
from .parts import blocks_of
from .sparse_moe import Experts
from .towers import mark_initialized, sparse_blocks

logger = logging.getLogger(__name__)

BITS = (4, 8)
# Where the parts are, as full names: the host matches names from their beginning.
PART_PATHS = {"text": "model.language_model", "vision": "model.vision_tower", "connector": "model.connector"}
INT8_MAX = 127
NF4_BLOCK = 64
NOT_SAVED = (
    "Packed experts are not saved: save the adapter that was trained on them, or load the model without "
    "quantization to save it."
)


class Int8Rows(nn.Module):
    """Gives a weight back from its int8 codes and the scales of its rows, in the dtype it had.

    Args:
        scale: (..., rows, 1), float32.
        dtype: the weight's.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("scale", scale)
        self.dtype = dtype

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """Maps int8 codes (..., rows, columns) to the weight of that shape."""
        return guard((codes * self.scale).to(self.dtype))


class Nf4Blocks(nn.Module):
    """Gives a weight back from its NF4 codes and the scales of its blocks, in the shape and dtype it had.

    Args:
        state: bitsandbytes' state of the flat weight: of a weight with rows shorter than a block its CPU kernel takes
            the wrong scales (0.50.2).
        shape: the weight's.
    """

    absmax: Tensor
    code: Tensor

    def __init__(self, state: Any, shape: torch.Size):
        super().__init__()
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code)
        self.state, self.shape = state, shape

    @torch.no_grad()
    def forward(self, codes: Tensor) -> Tensor:
        """Maps uint8 codes, two to a byte, to the weight."""
        from bitsandbytes.functional import dequantize_4bit

        self.state.absmax, self.state.code = self.absmax, self.code  # buffers follow the module to its device
        return guard(dequantize_4bit(codes, self.state).view(self.shape))


def _quantized_8bit(weight: Tensor) -> tuple[Tensor, nn.Module]:
    scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
    return (weight / scale).round().to(torch.int8), Int8Rows(scale, weight.dtype)


def _quantized_4bit(weight: Tensor) -> tuple[Tensor, nn.Module]:
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise ValueError("Experts in 4 bits need bitsandbytes. Install it: pip install 'vlmoe[quantize]'.") from error
    codes, state = quantize_4bit(weight.flatten(), blocksize=NF4_BLOCK, quant_type="nf4")
    return codes, Nf4Blocks(state, weight.shape)


QUANTIZED = {4: _quantized_4bit, 8: _quantized_8bit}


def _keep_unpacked(module: nn.Module, args: tuple) -> None:
    settle_adapters(module)
    # A kernel may read a weight several times in one pass. The count is that of `torch.nn.utils.parametrize.cached`.
    parametrize._cache_enabled += 1


def _let_go(module: nn.Module, args: tuple, output: Any) -> None:
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def pack(experts: nn.Module, name: str, bits: int) -> None:
    """Puts codes in the place of one stack of weights; reading it gives a tensor as before."""
    codes, unpack = QUANTIZED[bits](getattr(experts, name).detach())
    if not parametrize.is_parametrized(experts):  # its first stack
        experts.register_forward_pre_hook(_keep_unpacked)
        experts.register_forward_hook(_let_go, always_call=True)
    setattr(experts, name, nn.Parameter(codes, requires_grad=False))
    parametrize.register_parametrization(experts, name, unpack, unsafe=True)


def _stacks(experts: nn.Module) -> list[str]:
    """The names of the weights of a stack of experts that are not packed yet; biases stay as they are."""
    return [name for name, tensor in experts.named_parameters(recurse=False) if tensor.ndim == 3]


def _check(bits: int, parts: str | tuple[str, ...]) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r}; expected one of {', '.join(map(str, BITS))}.")
    if isinstance(parts, str) or not parts or (unknown := sorted(set(parts) - set(PARTS))):
        given = unknown if parts and not isinstance(parts, str) else parts
        raise ValueError(f"parts has {given!r}; expected a list of some of: {', '.join(PARTS)}.")


def _refuse_deltas(model: nn.Module, parts: Iterable[str]) -> None:
    """Raises a ValueError where one of these parts has delta experts."""
    if any(isinstance(experts, DeltaExperts) for _, experts in _experts_of(model, parts)):
        refuse_delta_experts(model, "Packing experts in 8 or 4 bits")


def _experts_of(model: nn.Module, parts: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The stacks of experts of these parts, by full name."""
    return [(path, block.experts) for path, block in blocks_of(model, tuple(parts))]


def skipped_modules(parts: Iterable[str] = ("text",)) -> list[str]:
    """What a configuration of transformers has to leave alone (`llm_int8_skip_modules`, `modules_to_not_convert`).

    Args:
        parts: the parts that are quantized: of "text", "vision", "connector".
    """
    return [path for part, path in PART_PATHS.items() if part not in parts] + ["lm_head"]


def quantize_experts(model: Any, bits: int = 4, parts: Iterable[str] = ("text",)) -> Any:
    """Packs the experts of a model in memory, in place; its Linears stay as they are.

    To be called once the model is where it is to run. What is trained afterwards is an adapter; the packed model is
    not saved.

    Args:
        model: a `VLMoEForConditionalGeneration`, or another head.
        bits: 4 (needs bitsandbytes) or 8.
        parts: whose experts: of "text", "vision", "connector".

    Returns:
        The model.

    Raises:
        ValueError: if there are no such experts, if they are packed already, or if they are offloaded.
    """
    parts = parts if isinstance(parts, str) else tuple(parts)
    _check(bits, parts)
    _refuse_deltas(model, parts)
    stacks = _experts_of(model, parts)
    if not stacks:
        raise ValueError(f"The model has no experts in {', '.join(parts)}. Give a sparse model, or name other parts.")
    for path, experts in stacks:
        names = _stacks(experts)
        if not names:
            raise ValueError(f"{path}.experts are packed already. Load the model anew to choose other bits.")
        if any(getattr(experts, name).is_meta for name in names):
            raise ValueError(
                f"{path}.experts are offloaded. Load the model with quantization_config=VLMoEQuantizationConfig(...), "
                "or without offloading."
            )
    for _, experts in stacks:
        for name in _stacks(experts):
            pack(experts, name, bits)
    _forbid_saving(model, VLMoEQuantizationConfig(bits, parts))
    return model


def _forbid_saving(model: Any, config: "VLMoEQuantizationConfig") -> None:
    """Lets the host refuse to save what it could not load, and to train packed weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        model.hf_quantizer = QUANTIZERS[config.bits](config)
        model.is_quantized = True
    else:
        quantizer.is_serializable = is_never_serializable


def expert_bytes(model: nn.Module) -> dict[str, int]:
    """How many bytes the weights of each stack of experts take, their scales included, by full name."""
    found = {}
    for path, block in sparse_blocks(model):
        tensors = [*block.experts.parameters(), *block.experts.buffers()]
        found[f"{path}.experts"] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return found


class PackExperts(ConversionOps):
    """Packs an expert stack as soon as it is read, so that no more than one is in memory unpacked.

    Args:
        bits: 4 or 8.
        of_linears: what the host does with a Linear's weight.
    """

    def __init__(self, bits: int, of_linears: ConversionOps):
        self.bits, self.of_linears = bits, of_linears

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the host calls it for every tensor that `param_needs_quantization`."""
        full_name = kwargs["full_layer_name"]
        module, name = get_module_from_name(kwargs["model"], full_name)
        if not isinstance(module, Experts):
            return self.of_linears.convert(input_dict, *args, **kwargs)
        value = next(iter(input_dict.values()))
        value = value[0] if isinstance(value, list) else value
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
        pack(module, name, self.bits)
        mark_initialized(module)
        kwargs["missing_keys"].discard(full_name)
        return {}


def is_never_serializable() -> bool:
    """For the host's quantizers; what they say goes before the host's refusal."""
    logger.warning(NOT_SAVED)
    return False


class _WithExperts:
    """What the host's bitsandbytes quantizers gain: expert stacks of the chosen parts."""

    quantization_config: Any

    def preprocess_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_deltas(model, self.quantization_config.parts)
        return super().preprocess_model(model, *args, **kwargs)  # type: ignore[misc]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, Experts):
            prefixes = tuple(f"{PART_PATHS[part]}." for part in self.quantization_config.parts)
            return param_name.startswith(prefixes) and name in _stacks(module)
        return super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]

    def get_quantize_ops(self) -> PackExperts:
        return PackExperts(self.quantization_config.bits, super().get_quantize_ops())  # type: ignore[misc]

    def is_serializable(self) -> bool:
        return is_never_serializable()


@register_quantizer("vlmoe_4bit")
class Vlmoe4BitHfQuantizer(_WithExperts, Bnb4BitHfQuantizer):
    """bitsandbytes' 4 bits, for Linears and experts."""


@register_quantizer("vlmoe_8bit")
class Vlmoe8BitHfQuantizer(_WithExperts, Bnb8BitHfQuantizer):
    """bitsandbytes' 8 bits for Linears, int8 rows for experts."""


QUANTIZERS = {4: Vlmoe4BitHfQuantizer, 8: Vlmoe8BitHfQuantizer}


@register_quantization_config("vlmoe")
class VLMoEQuantizationConfig(BitsAndBytesConfig):
    """For `from_pretrained(..., quantization_config=...)`: bitsandbytes on the Linears, and the experts packed too.

    Args:
        bits: 4 or 8.
        parts: what is quantized: of "text", "vision", "connector". The head and every router keep their precision.
        **kwargs: those of `BitsAndBytesConfig`; `llm_int8_skip_modules` are full names, left alone as well.

    Raises:
        ValueError: for other bits or parts.
    """

    def __init__(self, bits: int = 4, parts: Iterable[str] = ("text",), **kwargs: Any):
        parts = parts if isinstance(parts, str) else tuple(parts)
        _check(bits, parts)
        self.bits, self.parts = bits, parts
        # What the host writes of a configuration, and reads again.
        for name, meant in (("load_in_4bit", bits == 4), ("load_in_8bit", bits == 8)):
            if kwargs.pop(name, meant) != meant:
                raise ValueError(f"{name} is {not meant}, but bits is {bits}. Give bits alone.")
        skipped = [*skipped_modules(parts), *(kwargs.get("llm_int8_skip_modules") or ())]
        kwargs["llm_int8_skip_modules"] = list(dict.fromkeys(skipped))
        if bits == 4:
            kwargs = {"bnb_4bit_quant_type": "nf4"} | kwargs
        super().__init__(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **kwargs)
        self.quant_method: Any = f"vlmoe_{bits}bit"
