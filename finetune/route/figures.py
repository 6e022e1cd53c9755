"""The figures of `vlmoe route`, as PNGs beside the page: the same numbers for papers and reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .page import PageMaker
from .palette import DARK, channels, colour

DPI = 110
MODALITY_COLOURS = {"image": "#0072b2", "text": "#d55e00"}
METADATA = {"Software": None}  # not the version that drew it


def new_figure(width: float, height: float) -> Any:
    """An empty figure.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("vlmoe route draws with matplotlib: pip install 'vlmoe[train]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def padded(rows: list[list[float]]) -> Any:
    """Rows of unlike lengths as one array; nothing where a row ends."""
    import numpy as np

    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def draw_heat(axes: Any, rows: list[list[float]], labels: list[str], title: str) -> Any:
    """A heat map with a label for each row; columns are experts."""
    values = padded(rows)
    shown = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xticks(range(0, values.shape[1], max(1, values.shape[1] // 16)))
    axes.set_xlabel("expert", fontsize=8)
    axes.set_title(title, fontsize=9)
    return shown


def draw_load(maker: PageMaker, first: str) -> Any:
    """Every layer's load, by dataset and modality."""
    tables = maker.overview()
    height = max(2.2, 0.28 * max(len(table["rows"]) for table in tables) + 1.4)
    figure = new_figure(5.2 * len(tables), height)
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        rows = [row["load"]["load"] for row in table["rows"]]
        title = f"{table['modality']} tokens of {plain(table['dataset'])}"
        shown = draw_heat(axes, rows, [row["title"] for row in table["rows"]], title)
        figure.colorbar(shown, ax=axes, label="share of assignments")
    return figure


def draw_measures(maker: PageMaker, first: str) -> Any:
    """Entropy, top probability and similarity of every layer."""
    layers = maker.report["layers"]
    figure = new_figure(12, max(2.6, 0.3 * len(layers) + 1.4))
    charts = figure.subplots(1, 3, sharey=True)
    for axes, name in zip(charts[:2], ("entropy", "top_probability"), strict=True):
        for modality, shade in MODALITY_COLOURS.items():
            for load_place, dataset in enumerate(one["label"] for one in maker.report["datasets"]):
                points = [
                    (load[name], place)
                    for place, layer in enumerate(layers)
                    for load in layer["loads"]
                    if (load["dataset"], load["modality"]) == (dataset, modality) and load[name] is not None
                ]
                if points:
                    across, down = zip(*points, strict=True)
                    marker = "osD^v<>ph*"[load_place % 10]
                    axes.plot(across, down, marker, color=shade, label=f"{modality}, {plain(dataset)}")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlim(0, 1.02)
        axes.legend(fontsize=7)
    known = [(layer["similarity"], place) for place, layer in enumerate(layers) if layer["similarity"] is not None]
    if known:
        across, down = zip(*known, strict=True)
        charts[2].plot(across, down, "o", color=DARK)
    charts[2].set_title("similarity of experts", fontsize=9)
    charts[0].set_yticks(range(len(layers)), [layer["title"] for layer in layers], fontsize=8)
    charts[0].invert_yaxis()
    for axes in charts:
        axes.grid(axis="both", color="#e6e9ed")
    return figure


def draw_together(maker: PageMaker, first: str) -> Any:
    """Which experts of the chosen layer are chosen together."""
    layer = find_layer(maker, first)
    figure = new_figure(5.4, 4.6)
    axes = figure.subplots()
    experts = [f"{expert}" for expert in range(layer["num_experts"])]
    shown = draw_heat(axes, layer["co_activation"]["share"], experts, f"Co-activation, {layer['title']}")
    axes.set_ylabel("of the tokens of expert", fontsize=8)
    figure.colorbar(shown, ax=axes, label="share that also went to the column's")
    return figure


def draw_specialisation(maker: PageMaker, first: str) -> Any:
    """What experts tell about labels and words, beside chance."""
    layers = maker.report["layers"]
    found = [(layer["title"], one) for layer in layers for one in layer["specialisation"]]
    figure = new_figure(9, max(2.4, 0.26 * len(found) + 1.2))
    axes = figure.subplots()
    labels = [f"{title}: {one['modality']} by {one['by']}, {plain(one['dataset'])}" for title, one in found]
    axes.barh(range(len(found)), [one["information"] for _, one in found], color="#56b4e9", label="measured")
    axes.plot([one["by_chance"] for _, one in found], range(len(found)), "|", color=DARK, markersize=9, label="chance")
    axes.set_yticks(range(len(found)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("normalised mutual information", fontsize=8)
    axes.legend(fontsize=8)
    return figure


def draw_patches(maker: PageMaker, first: str) -> Any:
    """The images that are shown, their patches coloured by expert at the chosen layer; None where there are none."""
    import numpy as np

    layer = find_layer(maker, first)
    pairs = [
        (sample, kept.pictures[index], patches)
        for sample, kept in zip(maker.report["samples"], maker.samples, strict=True)
        for index, patches in enumerate(sample["patches"].get(first, []))
        if patches is not None
    ]
    if not pairs:
        return None
    columns = min(len(pairs), 4)
    rows = -(-len(pairs) // columns)
    figure = new_figure(3.0 * columns, 3.1 * rows + 0.5)
    figure.suptitle(f"Patches by expert, {layer['title']}", fontsize=11)
    charts = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (sample, picture, patches) in zip(charts, pairs, strict=False):
        axes.imshow(picture.image, extent=(0, patches["columns"], patches["rows"], 0), aspect="auto")
        painted = np.array([channels(colour(expert)) for expert in patches["experts"]], dtype=np.uint8)
        painted = painted.reshape(patches["rows"], patches["columns"], 3)
        axes.imshow(painted, extent=(0, patches["columns"], patches["rows"], 0), alpha=0.65, aspect="auto")
        axes.set_box_aspect(picture.image.height / picture.image.width)
        axes.set_title(f"row {sample['row']}: {plain(sample['label'])}", fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    from matplotlib.patches import Patch

    experts = sorted({expert for _, _, patches in pairs for expert in patches["experts"]})
    handles = [Patch(color=colour(expert), label="none" if expert < 0 else str(expert)) for expert in experts]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 16), fontsize=8, title="expert")
    return figure


def plain(text: str, most: int = 40) -> str:
    """Text from data as a figure shows it: short, and no mathematics in dollar signs."""
    line = " ".join(text.split())
    return (line if len(line) <= most else f"{line[: most - 1]}…").replace("$", r"\$")


def find_layer(maker: PageMaker, name: str) -> dict[str, Any]:
    """A layer's numbers."""
    return next(layer for layer in maker.report["layers"] if layer["name"] == name)


FIGURES: dict[str, Callable[[PageMaker, str], Any]] = {
    "load.png": draw_load,
    "measures.png": draw_measures,
    "co_activation.png": draw_together,
    "specialisation.png": draw_specialisation,
    "patches.png": draw_patches,
}


def draw_figures(folder: Path, maker: PageMaker, first: str) -> list[str]:
    """Writes the figures.

    Args:
        folder: where to.
        maker: of the page.
        first: the chosen layer.

    Returns:
        Their names.
    """
    written = []
    for name, draw in FIGURES.items():
        if (figure := draw(maker, first)) is not None:
            figure.savefig(folder / name, dpi=DPI, metadata=METADATA)
            written.append(name)
    return written
