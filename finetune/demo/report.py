"""The demo's one table: who answered how much, by kind of question, and what the routing looks like."""

from pathlib import Path
from typing import Any

from .routing import COPIES_ABOVE
from .scenes import KINDS
from .stages import read_result

ROWS = {
    "majority answer": ("data", "majority"),
    "sparse, shuffled images": ("shuffled", "accuracy"),
    "LLM tuned blind": ("blind", "accuracy"),
    "dense, same steps": ("dense", "accuracy"),
    "dense, equal time": ("equal_time", "accuracy"),
    "sparse": ("sparse", "accuracy"),
}


def cell(share: dict[str, float]) -> str:
    """An accuracy with its 95 % interval."""
    return f"{share['accuracy']:.3f} [{share['low']:.3f} {share['high']:.3f}]"


def table(root: Path) -> str:
    """The accuracies of all contestants and controls."""
    columns = ("all", *KINDS)
    lines = [f"{'accuracy [95 % interval]':<26}" + "".join(f"{name:<22}" for name in columns)]
    for name, (stage, key) in ROWS.items():
        found = read_result(root, stage)[key]
        shares = [found, *(found["groups"][kind] for kind in KINDS)]
        lines.append(f"{name:<26}" + "".join(f"{cell(share):<22}" for share in shares))
    counts = read_result(root, "sparse")["accuracy"]
    numbers = [counts["count"], *(counts["groups"][kind]["count"] for kind in KINDS)]
    lines.append(f"{'questions':<26}" + "".join(f"{number:<22}" for number in numbers))
    return "\n".join(lines)


def training(root: Path) -> str:
    """Steps and seconds of each contestant."""
    lines = []
    for name in ("sparse", "dense", "equal_time", "blind"):
        result: dict[str, Any] = read_result(root, name)
        seconds = result["seconds"]
        lines.append(
            f"  {name.replace('_', ' '):<12} {result['steps']:>5} tuning steps, "
            f"{seconds['align']:5.0f} s aligning + {seconds['tune']:5.0f} s tuning"
        )
    return "\n".join(lines)


def likeness(part: str, similarity: float) -> str:
    """How alike a part's experts are, and whether they are anything but copies."""
    return f"{part} {similarity:.4f}" + (" (the experts are still copies)" if similarity > COPIES_ABOVE else "")


def summary(root: Path) -> str:
    """All that the demo found, as text."""
    made, routing = read_result(root, "upcycle"), read_result(root, "routing")
    proof, parameters, largest = made["proof"], made["parameters"], routing["largest_load"]
    parents = ", ".join(
        f"{name} {read_result(root, stage)['accuracy']:.3f}" for name, stage in (("LLM", "text"), ("ViT", "vision"))
    )
    return "\n".join(
        [
            f"Parents on held-out scenes: {parents}",
            f"Upcycled: {parameters['total']:,} parameters, {parameters['active']:,} active; largest gap to the "
            "parents "
            f"{proof['largest_gap']:.1e} standard deviations",
            "",
            table(root),
            "",
            "Training, one thread each:",
            training(root),
            f"Largest expert load: {largest['share']:.2f} of a layer's assignments ({largest['layer']})",
            "Cosine similarity of experts: "
            + ", ".join(map(likeness, *zip(*routing["similarity"].items(), strict=True))),
        ]
    )
