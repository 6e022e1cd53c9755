"""The picture of the routing: for each sparse layer, what share of each task's image tokens each expert gets."""

from pathlib import Path
from typing import Any

from .extras import new_figure

ROUTING = "routing.png"


def draw_routing(path: Path, report: dict[str, Any]) -> None:
    """Draws one chart per layer, tasks x experts.

    Args:
        path: of the PNG.
        report: what `routing_by_task` gave.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    layers = report["layers"]
    num_tasks = max(len(layer["load"]) for layer in layers.values())
    figure = new_figure(figsize=(3.4 * len(layers) + 1.2, 0.55 * num_tasks + 1.7))
    figure.suptitle("Share of each task's image tokens, by expert", fontsize=10)
    for axes, (name, layer) in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers.items(), strict=True):
        loads = list(layer["load"].values())
        axes.imshow(loads, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for y, shares in enumerate(loads):
            for x, share in enumerate(shares):
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.6 else "black")
        axes.set_xticks(range(len(loads[0])), [f"expert {expert}" for expert in range(len(loads[0]))], fontsize=8)
        is_first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(range(len(loads)), list(layer["load"]) if is_first else [""] * len(loads), fontsize=9)
        axes.set_title(f"{name}: {layer['divergence_bits']:.3f} bits", fontsize=9)
    figure.savefig(path, dpi=110)
