"""`vlmoe route`, top to bottom: checks, model, datasets, passes, numbers, figures, page."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import ADAPTER_CONFIG_NAME

from ..checkpoints import load_base, load_base_config, load_finetuned, load_processor
from ..collator import check_rows
from ..data import load_chat_data
from ..data_formats.checks import reading_of
from ..sources import describe_source
from ..train import MERGED
from .figures import FIGURES, draw_figures, new_figure
from .page import PageMaker
from .report import build_report
from .run import RoutingRun, label_of
from .settings import NUMBERS, PAGE, RouteSettings

OURS = (PAGE, NUMBERS, *FIGURES)


def check_folder(settings: RouteSettings) -> Path:
    """The result's folder.

    Raises:
        ValueError: if it holds something else, or an earlier result that is not to be overwritten.
    """
    folder = Path(settings.output_dir)
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder.")
    found = {path.name for path in folder.iterdir()}
    if found - set(OURS):
        raise ValueError(
            f"output_dir {folder} holds {', '.join(sorted(found - set(OURS))[:3])}, which vlmoe route did not write; "
            "name another folder."
        )
    if found and not settings.force:
        raise ValueError(f"output_dir {folder} is not empty. Name another folder, or give --force to overwrite it.")
    return folder


def load_model(settings: RouteSettings) -> tuple[Any, Any]:
    """The model, an adapter merged into it, and its processor.

    Raises:
        ValueError: if there is none that can be loaded, or no part of it is sparse.
    """
    if (Path(settings.checkpoint) / ADAPTER_CONFIG_NAME).is_file():
        model, processor = load_finetuned(settings.checkpoint, trust_remote_code=settings.trust_remote_code)
        model = model.merge_and_unload(safe_merge=True)
    else:
        hub: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        config = load_base_config(settings.checkpoint, **hub)
        processor = load_processor(settings.checkpoint, config, **hub)
        model = load_base(settings.checkpoint, **hub)
    if all(model.config.moe(part) is None for part in ("text", "vision", "connector")):
        raise ValueError(f"model {settings.checkpoint} is dense, so it routes nothing; give a sparse one.")
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model, processor


def label_sources(sources: list[str]) -> list[dict[str, Any]]:
    """What each source is called: names that are given twice are counted."""
    found: list[dict[str, Any]] = []
    for source in sources:
        known = describe_source(source)
        same = sum(one["name"] == known["name"] for one in found)
        found.append(known | {"label": f"{known['name']} ({same + 1})" if same else known["name"]})
    return found


def name_model(checkpoint: str) -> dict[str, Any]:
    """What the model is called: a merged one, whose folder has no name of its own, with the run's."""
    known: dict[str, Any] = describe_source(checkpoint)
    if known["name"] == MERGED:
        known["name"] = f"{Path(checkpoint).resolve().parent.name}/{MERGED}"
    return known


def find_layer(report: dict[str, Any], wanted: str | None) -> str:
    """The name of the layer that is shown first.

    Raises:
        ValueError: if no sparse layer is called so.
    """
    names = [layer["name"] for layer in report["layers"]]
    if wanted is None:
        of_vit = [layer["name"] for layer in report["layers"] if layer["part"] == "vision"]
        return (of_vit or names)[-1]
    part, _, index = wanted.rpartition("/")
    name = wanted if wanted in names else f"{part or 'text'}/layer_{index.removeprefix('layer_')}"
    if name not in names:
        raise ValueError(f"layer is {wanted}, but the sparse layers are {', '.join(names)}; choose one of them.")
    return name


def route(settings: RouteSettings) -> Path:
    """Writes the page, the figures and the numbers.

    Args:
        settings: what to route, and where to.

    Returns:
        The folder.

    Raises:
        ValueError: for whatever the user can mend.
    """
    folder = check_folder(settings)
    new_figure(1, 1)  # refuses early where it is not installed
    model, processor = load_model(settings)
    run, described = RoutingRun(model, processor, settings.batch_size), label_sources(settings.data)
    for source, known in zip(settings.data, described, strict=True):
        rows = load_chat_data(source, settings.split, **asdict(reading_of(settings)))
        check_rows(rows, processor)
        known["rows"] = len(rows)
        label = partial(label_of, label_field=settings.label_field)
        run.add(known["label"], rows, settings.num_samples, settings.num_shown, label)
    report = build_report(run, name_model(settings.checkpoint), described, settings)
    first, maker = find_layer(report, settings.layer), PageMaker(report, run.samples)
    page = maker.render(first)
    folder.mkdir(parents=True, exist_ok=True)
    for name in OURS:
        (folder / name).unlink(missing_ok=True)
    (folder / NUMBERS).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_figures(folder, maker, first)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder
