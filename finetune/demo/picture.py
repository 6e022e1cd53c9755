"""One picture of what the demo made: pictures with question, answer and truth, and where each layer sends its
tokens.
"""

from pathlib import Path
from typing import Any

from transformers.image_utils import load_image

from ..evaluation import reference_answer

NUM_ROWS, NUM_COLUMNS = 2, 5
GOOD, BAD = "#1a7f37", "#cf222e"


def pick_samples(test: Any, predictions: list[str]) -> list[int]:
    """Indices to show: the kinds in turn, and one wrong answer of each kind if there is one."""
    by_kind: dict[str, list[int]] = {}
    for index, row in enumerate(test):
        by_kind.setdefault(row["kind"], []).append(index)
    picked = []
    for indices in by_kind.values():
        wrong = [index for index in indices if predictions[index] != reference_answer(test[index])]
        picked += [indices[0], *(wrong[:1] or indices[1:2])]
    return picked[: NUM_ROWS * NUM_COLUMNS]


def question_of(row: dict[str, Any]) -> str:
    return next(part["text"] for part in row["messages"][0]["content"] if part["type"] == "text")


def draw_picture(path: Path, test: Any, predictions: list[str], report: dict[str, Any]) -> None:
    """Draws and writes the picture.

    Args:
        path: of the PNG.
        test: rows with their images.
        predictions: the model's answers to them.
        report: what `routing_report` gave.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("The demo draws with matplotlib: pip install 'vlmoe[train]'.") from error
    figure = Figure(figsize=(14, 9.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.5, 1])
    top, bottom = parts
    top.suptitle(
        "Held-out scenes: question, answer (truth); of each kind the first, and a wrong one where there is one"
    )
    for axes, index in zip(top.subplots(NUM_ROWS, NUM_COLUMNS).flat, pick_samples(test, predictions), strict=False):
        row, answer = test[index], predictions[index]
        truth = reference_answer(row)
        axes.imshow(load_image(row["images"][0]["path"]))
        axes.set_axis_off()
        axes.set_title(f"{question_of(row)}\n{answer} ({truth})", fontsize=9, color=GOOD if answer == truth else BAD)
    draw_loads(bottom, report["layers"])
    figure.savefig(path, dpi=110)


def draw_loads(figure: Any, layers: dict[str, dict[str, list[float]]]) -> None:
    """One bar chart per sparse layer: the experts' shares of image tokens and of text tokens."""
    figure.suptitle("Expert load: share of each layer's assignments, by modality (line: even)")
    charts = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    colours = {"image": "#0969da", "text": "#bf8700"}
    for axes, (name, by_modality) in zip(charts, layers.items(), strict=True):
        width = 0.8 / len(by_modality)
        for place, (modality, values) in enumerate(by_modality.items()):
            positions = [expert + place * width for expert in range(len(values))]
            axes.bar(positions, values, width=width, label=modality, color=colours[modality])
        num_experts = len(next(iter(by_modality.values())))
        axes.axhline(1 / num_experts, color="black", linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("expert", fontsize=8)
        axes.legend(fontsize=7)
