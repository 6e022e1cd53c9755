"""What would be written, in words."""

from collections import Counter

from .mapping import Mapping


def format_bytes(count: int) -> str:
    """1234567890 as 1.23 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"


def summarise(mapping: Mapping, draws_connector: bool = False) -> str:
    """What would be written, for people: like tensors of all layers in one line."""
    groups: dict[tuple, list] = {}
    for assignment in mapping.assignments:
        name = ".".join("*" if piece.isdigit() else piece for piece in assignment.spec.name.split("."))
        groups.setdefault((name, assignment.operation, assignment.spec.shape), []).append(assignment)
    lines = []
    for (name, operation, _), members in groups.items():
        first = members[0]
        sources = f" of {' + '.join(first.dense_names)}" if first.dense_names else ""
        times = f"{len(members)} x " if len(members) > 1 else ""
        dtype = str(first.spec.dtype).removeprefix("torch.")
        lines.append(f"{operation:8}{times}{name} {list(first.spec.shape)} {dtype}{sources}")
    if draws_connector:
        lines.append("the dense connector that these are made of is drawn: the parents have none")
    for role, reasons in mapping.dropped.items():
        lines += [f"dropped {count} x {role}: {reason}" for reason, count in Counter(reasons.values()).items()]
    lines.append(
        f"{mapping.num_parameters:,} parameters, {mapping.num_active_parameters:,} active per token, "
        f"{format_bytes(mapping.num_bytes)}"
    )
    return "\n".join(lines)
