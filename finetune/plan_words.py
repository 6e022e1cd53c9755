"""A memory plan in words: a table, one line, and what is said when memory has run out."""

from collections.abc import Iterable
from typing import Any

from .gpus import CPU, GB, Device, smallest_size
from .memory_plan import RESERVE, MemoryPlan
from .remedies import Remedy

NOTHING_LOWER = "  nothing of a recipe that could be changed takes less: use a larger device, or a smaller model"


def gigabytes(num_bytes: float) -> str:
    """Bytes as people read them: of small models in MB."""
    return f"{num_bytes / GB:.2f} GB" if num_bytes >= 0.1 * GB else f"{num_bytes / 1e6:.1f} MB"


def describe_batch(plan: MemoryPlan) -> str:
    """The batch that was planned with."""
    return f"{plan.num_rows} x {plan.length} tokens"


def name_device(device: Device) -> str:
    """What was planned for."""
    return "on a CPU" if device == CPU else "on a GPU that has no grouped_mm" if device.is_old else "on a GPU"


def packed(config: Any) -> str:
    """What is to be known of weights that are saved packed, of which plans know nothing; else nothing."""
    said = getattr(config, "quantization_config", None)
    if said is None:
        return ""
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return (
        f"The weights are saved packed (quantization_config: {getattr(method, 'value', method)}), which is not "
        "counted: this is with whole weights, which take more."
    )


def table(plan: MemoryPlan) -> str:
    """The parts, one below the other, and their sum."""
    rows = [*plan.parts.items(), ("peak", plan.peak)]
    width = max(len(name) for name, _ in rows)
    sizes = [(name, gigabytes(size) if size else "none then") for name, size in rows]
    return "\n".join(f"  {name:<{width}}  {size:>9}" for name, size in sizes)


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
