"""Reading a model larger than the free memory once, front to back: the next block's pages are read ahead while this one computes.

What has been used is let go of, so that the page cache stays as small as two blocks. All of this is advice to the kernel: where it is
not understood, pages are read when they are touched and stay until others need the memory.
"""

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

MADV_POPULATE_READ = 22  # Linux 5.14; not in Python's mmap
IS_SUPPORTED = hasattr(os, "posix_fadvise") and hasattr(mmap, "MADV_DONTNEED")


@dataclass(frozen=True)
class MappedSpan:
    """Where a mapped tensor is, in memory and in its file. It holds the tensor, so that the memory stays what it is."""

    tensor: Tensor
    file: Path
    offset: int

    def _advise(self, advice: int) -> None:
        address, length = self.tensor.data_ptr(), self.tensor.nbytes
        start = address - address % mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), advice)

    def read_ahead(self) -> None:
        """Brings the pages into memory."""
        if IS_SUPPORTED:
            self._advise(mmap.MADV_SEQUENTIAL)
            self._advise(MADV_POPULATE_READ)

    def let_go(self) -> None:
        """Gives the pages back; reading them again reads the file again."""
        if IS_SUPPORTED:
            self._advise(mmap.MADV_DONTNEED)
            with self.file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), self.offset, self.tensor.nbytes, os.POSIX_FADV_DONTNEED)


class PageFlow:
    """Reads ahead for modules that run one after the other, by a thread of its own.

    Args:
        blocks: The modules in the order in which they run, and their tensors' spans.
    """

    def __init__(self, blocks: list[tuple[nn.Module, list[MappedSpan]]]):
        self._spans = [spans for _, spans in blocks]
        self._thread = ThreadPoolExecutor(max_workers=1)
        for index, (module, _) in enumerate(blocks):
            module.register_forward_pre_hook(lambda *_, index=index: self._start(index))
            module.register_forward_hook(lambda *_, index=index: self._finish(index))
        self._ahead(0)

    def _ahead(self, index: int) -> None:
        for span in self._spans[index] if index < len(self._spans) else []:
            self._thread.submit(span.read_ahead)

    def _start(self, index: int) -> None:
        self._ahead(index + 1)

    def _finish(self, index: int) -> None:
        for span in self._spans[index]:
            self._thread.submit(span.let_go)

    def close(self) -> None:
        """Waits for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
