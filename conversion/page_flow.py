"""Reading a model larger than the free memory once: what has been used gives its file pages back.

The page cache then stays about as small as one block and is used again and again. (Reading ahead by advice was
measured too and gained nothing.) It is advice to the kernel: where it is not understood, pages stay until others need
the memory.
"""

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

IS_SUPPORTED = hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_DONTNEED")


@dataclass(frozen=True)
class MappedSpan:
    """A mapped tensor and its place in its file; it holds the tensor, so that the memory stays mapped."""

    tensor: Tensor
    file: Path
    offset: int

    def let_go(self) -> None:
        """Gives the pages back; reading the tensor again reads the file again.

        Advice for the whole file would drop what the kernel has read ahead for the next tensor.
        """
        if not IS_SUPPORTED:
            return
        address, length = self.tensor.data_ptr(), self.tensor.nbytes
        start = address - address % mmap.PAGESIZE
        size = ctypes.c_size_t(address + length - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)
        with self.file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), self.offset, length, os.POSIX_FADV_DONTNEED)


class PageFlow:
    """Lets go of modules' pages when they have run, by a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)

    def let_go_after(self, module: nn.Module, spans: list[MappedSpan]) -> None:
        """Lets go of these tensors whenever the module has run."""

        def submit(*_) -> None:
            for span in spans:
                self._thread.submit(span.let_go)

        module.register_forward_hook(submit)

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown(wait=True)
