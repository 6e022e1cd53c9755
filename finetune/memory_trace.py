"""What memory tensors take while something runs: by kind, at the moment when they take most.

Every tensor that torch makes is counted from the moment when its memory is taken to that when it is given back; so
tensors that have no numbers (`FakeTensor`) are counted as those that have.

    >>> with MemoryTrace() as trace:
    ...     model(**batch).loss.backward()
    >>> trace.peak, trace.peak_kinds
    (1536, {"activations": 1536})
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OTHER = "activations"


class MemoryTrace(TorchDispatchMode):
    """Within it memory is counted, in bytes.

    Args:
        kind_of: gives the kind of a tensor that has been made.

    Attributes:
        total: what is held.
        peak: the most that was held.
        peak_kinds: what was held then, by kind.
    """

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda made: OTHER):
        super().__init__()
        self.kind_of = kind_of
        self.held: dict[int, tuple[int, str]] = {}
        self.kinds: Counter[str] = Counter()
        self.total = self.peak = 0
        self.peak_kinds: dict[str, int] = {}

    def hold(self, tensor: Tensor, kind: str) -> None:
        """Counts a tensor, one that was made before or elsewhere too; one that is counted already changes its kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            num_bytes, before = self.held[key]
            self.kinds[before] -= num_bytes
        else:
            num_bytes = storage.nbytes()
            self.total += num_bytes
            weakref.finalize(storage, self._let_go, key)
        self.held[key] = num_bytes, kind
        self.kinds[kind] += num_bytes
        if self.total > self.peak:
            self.peak, self.peak_kinds = self.total, dict(self.kinds)

    def _let_go(self, key: int) -> None:
        num_bytes, kind = self.held.pop(key)
        self.kinds[kind] -= num_bytes
        self.total -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.held:
                self.hold(tensor, self.kind_of(tensor))
        return made


def bytes_of(tensors: Any) -> int:
    """What tensors take, those of one memory once."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
