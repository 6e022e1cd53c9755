"""Computing in bfloat16 with weights that stay in their files: what a model gives when all of it runs in that dtype.

The host's own sparse LMs route in the dtype of the model, vlmoe's in float32. How much that matters is measured with
this; nothing is judged by it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_vlmoe.routers import Router

from .mapped_maths import BLOCK_BYTES, mapped_maths
from .meta_models import is_mapped


class mapped_bfloat16(mapped_maths):
    """As `mapped_maths`, but each product is computed in its input's dtype, and embeddings give bfloat16."""

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` with the weight cast by blocks of rows."""
        step = max(1, BLOCK_BYTES // (2 * weight.shape[1]))
        biases = [None] * -(-weight.shape[0] // step) if bias is None else bias.to(input.dtype).split(step)
        # With the bias inside, as the kernel rounds once.
        blocks = zip(weight.split(step), biases, strict=True)
        return torch.cat([F.linear(input, rows.to(input.dtype), part) for rows, part in blocks], dim=-1)

    def embedding(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        """`F.embedding` that casts only the rows it gathers."""
        return F.embedding(input, weight, *args, **kwargs).to(torch.bfloat16)


def to_bfloat16(model: nn.Module) -> nn.Module:
    """Casts what a mapped model holds in memory, in place, as `from_pretrained(dtype=bfloat16)` would; our routers
    stay in float32, and so do buffers.
    """
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(module, Router) or is_mapped(module, name, parameter):
                continue
            if parameter.is_floating_point():
                module._parameters[name] = nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False)
    return model
