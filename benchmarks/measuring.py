"""Time and memory of things that are to be compared: in turn, in one process, medians."""

import platform
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def in_turn(works: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """The median seconds of each, run one after the other, again and again; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(runs + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], object]) -> int:
    """How far the memory of tensors rises above what was held before, while it works; it has worked once already.

    Every allocation is counted, so that other programs and the system's own caches have no say.
    """
    work()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0)


def _matmul_operations(left: torch.Size, right: torch.Size) -> int:
    return 2 * left[0] * left[1] * right[-1]


# Products that torch's counter does not know (2.13).
UNCOUNTED = {
    torch.ops.aten._grouped_mm: lambda left, right, *args, **kwargs: _matmul_operations(left, right),
    torch.ops.aten.addmm_: lambda total, left, right, **kwargs: _matmul_operations(left, right),
}


def count_operations(work: Callable[[], object]) -> int:
    """The floating-point operations of all matrix products in some work."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        work()
    return counter.get_total_flops()


def describe_machine() -> str:
    """What a table was measured on."""
    import peft
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"{device}; python {platform.python_version()}, {versions}"
