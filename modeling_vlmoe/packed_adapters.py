"""PEFT's LoRA on packed experts.

PEFT (0.21) adapts a stack of weights by a parametrization that it registers for one pass, a proxy behind what unpacks
the stack. It was written for weights that nobody else parametrizes, so three things go wrong, each mended here:

- It finds its proxy again only if that is a `_LoraParameterProxy`; a `_LoraFactorsProxy` stays, and the next pass
  fails.
- Reading a stack while another stack of the same module is adapted leaves the bare weight in torch's cache, and its
  own adapter is ignored.
- Merging adds to a copy, which is thrown away.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PEFT_LORA = "peft.tuners.lora.layer"


class UnpackedWeight(Tensor):
    """A packed stack as a tensor, read outside of a pass: to be looked at, not to be written."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        """Any attribute but `data`, to which PEFT adds an adapter.

        Raises:
            ValueError: for `data`.
        """
        if name != "data":
            return super().__getattribute__(name)
        raise ValueError(
            "An adapter cannot be merged into packed experts. Load the model without quantization and merge it there "
            "(modeling_vlmoe.finetune.merge_adapter)."
        )


def guard(weight: Tensor) -> Tensor:
    """A stack that has just been unpacked, kept from being written unless a pass is running."""
    return weight if parametrize._cache_enabled else weight.as_subclass(UnpackedWeight)


def make_removable(proxy: nn.Module) -> nn.Module:
    """A proxy of PEFT's that PEFT finds again."""
    layer: Any = sys.modules[PEFT_LORA]

    class Removable(layer._LoraParameterProxy):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, weight: Tensor) -> Tensor:
            return proxy(weight)

    return Removable()


def settle_adapters(experts: Any) -> None:
    """Called before packed experts run, when PEFT has registered its proxies."""
    for name, chain in experts.parametrizations.items():
        if len(chain) > 1:
            parametrize._cache.pop((id(experts), name), None)
        for index, proxy in enumerate(chain):
            if type(proxy).__module__ == PEFT_LORA and type(proxy).__name__ == "_LoraFactorsProxy":
                chain[index] = make_removable(proxy)
