"""A memory plan in words: a table, one line, and what is said when memory has run out."""

from collections.abc import Iterable

from .gpus import GB, smallest_size
from .memory_plan import RESERVE, MemoryPlan
from .remedies import Remedy


def gigabytes(num_bytes: float) -> str:
    """Bytes as people read them: of small models in MB."""
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / 1e6:.1f} MB"


def describe_batch(plan: MemoryPlan) -> str:
    """The batch that was planned with."""
    return f"{plan.num_rows} x {plan.length} tokens"


def table(plan: MemoryPlan) -> str:
    """The parts, one below the other, and their sum."""
    rows = [*plan.parts.items(), ("peak", plan.peak)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {gigabytes(size):>9}" for name, size in rows)


def one_line(plan: MemoryPlan) -> str:
    """The peak and its parts, the largest first."""
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    said = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts if size)
    return f"Memory: about {gigabytes(plan.peak)} at the peak of a step of {describe_batch(plan)}: {said}."


def fit(plan: MemoryPlan, capacity: int | None) -> str:
    """Whether the plan fits on a device of so many bytes; of none is known: which would do."""
    needed = plan.peak + RESERVE
    with_reserve = f"{gigabytes(needed)} with {gigabytes(RESERVE)} for the driver and gaps between tensors"
    if capacity is None:
        size = smallest_size(needed)
        return (
            f"It fits on a GPU of {size} GB: {with_reserve}." if size else f"It fits on no single GPU: {with_reserve}."
        )
    if plan.fits(capacity):
        return f"It fits on {gigabytes(capacity)}: {with_reserve}."
    return f"It does not fit on {gigabytes(capacity)}: {with_reserve}."


def list_remedies(remedies: Iterable[Remedy], capacity: int | None) -> str:
    """Remedies, one below the other, with their peaks."""
    lines = []
    for remedy in remedies:
        fits = "" if capacity is None else ", fits" if remedy.plan.fits(capacity) else ", does not fit"
        lines.append(f"  {remedy.how}: {gigabytes(remedy.plan.peak)}{fits} ({remedy.price})")
    return "\n".join(lines)
