"""Computing in float32 with weights that stay in their files, in whatever dtype they are stored.

Within `mapped_maths()` matrix products and embeddings are computed in float32, and their weight is cast a block of
rows at a time: neither a float32 layer nor a float32 expert ever exists as a whole.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

BLOCK_BYTES = 4 * 2**20  # of float32 rows: about what a core's cache holds
MOST_THREADS = 4  # the work is bound by memory
FEWEST_ROWS = 4  # a single row takes another kernel, which rounds ten times worse (an expert may get a single token)


class mapped_maths(TorchFunctionMode):
    """The context in which mapped models compute.

    Args:
        dtype: Round weights to this dtype first, the one the checkpoint is written in; None leaves them as they are.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype = dtype
        self.threads = ThreadPoolExecutor(max_workers=min(MOST_THREADS, os.cpu_count() or 1))

    def __exit__(self, *exception):
        self.threads.shutdown()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func is F.embedding:
            return self.embedding(*args, **kwargs)
        return func(*args, **kwargs)

    def read(self, stored: Tensor) -> Tensor:
        """Stored values as float32, rounded first where asked for."""
        return (stored if self.dtype is None else stored.to(self.dtype)).float()

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` in float32, with the weight cast by blocks of rows."""
        flat = input.reshape(-1, input.shape[-1])
        num_rows = len(flat)
        if num_rows < FEWEST_ROWS:
            flat = F.pad(flat, (0, 0, 0, FEWEST_ROWS - num_rows))
        output = flat.new_empty(len(flat), weight.shape[0])
        step = max(1, BLOCK_BYTES // (4 * weight.shape[1]))

        @torch.no_grad()  # which a thread does not inherit
        def multiply(start: int) -> None:
            output[:, start : start + step] = flat @ self.read(weight[start : start + step]).T

        # Threads of our own: torch's wait for one another after every block, which takes long on busy cores.
        list(self.threads.map(multiply, range(0, weight.shape[0], step)))
        output = output[:num_rows].reshape(*input.shape[:-1], weight.shape[0])
        return output if bias is None else output + bias

    def embedding(self, input: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        """`F.embedding` that casts only the rows it gathers."""
        return self.read(F.embedding(input, weight, *args, **kwargs))
