"""The page of `vlmoe route`: one HTML file with its style, its script and its images in it.

Everything that comes from model or data is escaped by the template. Nothing of it depends on the time or the machine,
so the same numbers give the same page.
"""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .palette import colour, ink, shade
from .run import Sample
from .settings import NUMBERS

HERE = Path(__file__).parent
LONGEST_SIDE = 384  # of a picture in the page, in pixels
SMALL = 128  # up to this side a picture is stored without loss
NOT_PLACED = "It is not known which token of this layer is which patch of this image."


def number(value: float | None, digits: int = 2) -> str:
    """A number in a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def cell(share: float, even: float) -> dict[str, str]:
    """A cell of a heat map."""
    fill = shade(share, even)
    return {"fill": fill, "ink": ink(fill), "percent": f"{100 * share:.1f}", "short": f"{100 * share:.0f}"}


def data_url(image: Image.Image) -> str:
    """A picture as a part of the page."""
    made = image.convert("RGB")
    made.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    written, kind = BytesIO(), "png" if max(made.size) <= SMALL else "jpeg"
    made.save(written, format=kind, **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def runs_of(patches: dict[str, Any], expert: int) -> str:
    """An SVG path of all patches of an expert; neighbours in a row are one piece."""
    pieces, columns = [], patches["columns"]
    for row in range(patches["rows"]):
        first = None
        for column in range(columns + 1):
            is_own = column < columns and patches["experts"][row * columns + column] == expert
            if is_own and first is None:
                first = column
            elif not is_own and first is not None:
                pieces.append(f"M{first} {row}h{column - first}v1h-{column - first}z")
                first = None
    return "".join(pieces)


def grid_lines(rows: int, columns: int) -> str:
    """An SVG path of the lines between patches."""
    across = "".join(f"M0 {row}h{columns}" for row in range(1, rows))
    return across + "".join(f"M{column} 0v{rows}" for column in range(1, columns))


def patch_paths(patches: dict[str, Any]) -> list[dict[str, Any]]:
    """The patches of an image, one path for each expert."""
    found = []
    for expert in sorted(set(patches["experts"])):
        count = patches["experts"].count(expert)
        name = "No expert" if expert < 0 else f"Expert {expert}"
        found.append(
            {
                "expert": "none" if expert < 0 else expert,
                "colour": colour(expert),
                "d": runs_of(patches, expert),
                "title": f"{name}: {count} of {len(patches['experts'])} patches",
            }
        )
    return found


def show_picture(picture: Any, css: str, patches: dict[str, Any] | None, alt: str) -> dict[str, Any]:
    """A picture of one sample in one layer."""
    paths = None if patches is None else patch_paths(patches)
    return {
        "css": css,
        "width": picture.image.width,
        "height": picture.image.height,
        "alt": alt,
        "why": NOT_PLACED,
        "paths": paths,
        "rows": patches and patches["rows"],
        "columns": patches and patches["columns"],
        "lines": patches and grid_lines(patches["rows"], patches["columns"]),
        "said": "" if paths is None else f"{alt}, its patches by expert. " + "; ".join(one["title"] for one in paths),
    }


def show_tokens(sample: dict[str, Any], layer: str) -> list[dict[str, Any]]:
    """The tokens of a sample in a layer of the LLM; none in other parts."""
    if layer not in sample["experts"]:
        return []
    shown, images = [], 0
    for token, expert in zip(sample["tokens"], sample["experts"][layer], strict=True):
        if token is None:
            images += 1
            shown.append({"image": images})
        elif token["text"]:
            fill, name = colour(expert), "none" if expert < 0 else expert
            looks = {"expert": name, "colour": fill, "ink": ink(fill)}
            shown.append({"image": None, "text": token["text"], "kind": token["class"]} | looks)
    return shown


def text_of(sample: dict[str, Any]) -> str:
    """What a sample says, without what its template writes around it: a line for each message."""
    pieces = [
        "\n" if token is None or token["class"] in ("special", "template") else token["text"]
        for token in sample["tokens"]
    ]
    return "\n".join(line.strip() for line in "".join(pieces).split("\n") if line.strip())


class PageMaker:
    """Makes the page.

    Args:
        report: what `report.build_report` gave.
        samples: the samples that are shown, with their pictures, in the report's order.
    """

    def __init__(self, report: dict[str, Any], samples: list[Sample]):
        self.report, self.samples = report, samples
        self.pictures = {
            (place, index): f"picture-{place}-{index}"
            for place, sample in enumerate(samples)
            for index, _ in enumerate(sample.pictures)
        }

    def style(self) -> str:
        """The style, with each picture once."""
        lines = [
            f".{name} {{ background-image: url({data_url(self.samples[place].pictures[index].image)}); }}"
            for (place, index), name in self.pictures.items()
        ]
        return (HERE / "page.css").read_text(encoding="utf-8") + "\n".join(lines)

    def overview(self) -> list[dict[str, Any]]:
        """A table of all layers for each dataset and modality."""
        found = []
        for dataset in (one["label"] for one in self.report["datasets"]):
            for modality in ("image", "text"):
                rows = []
                for layer in self.report["layers"]:
                    for load in layer["loads"]:
                        if (load["dataset"], load["modality"]) == (dataset, modality):
                            rows.append({"title": layer["title"], "load": load, "layer": layer})
                most = max((row["layer"]["num_experts"] for row in rows), default=0)
                for row in rows:
                    even = 1 / max(row["load"]["open_experts"], 1)
                    cells = [cell(share, even) for share in row["load"]["load"]]
                    row["cells"] = cells + [None] * (most - len(cells))
                if rows:
                    found.append({"dataset": dataset, "modality": modality, "rows": rows, "most_experts": most})
        return found

    def panel(self, layer: dict[str, Any]) -> dict[str, Any]:
        """What is shown of one layer."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for place, (sample, kept) in enumerate(zip(self.report["samples"], self.samples, strict=True)):
            patches = sample["patches"].get(layer["name"], [])
            shown = {
                "row": sample["row"],
                "label": sample["label"],
                "text": text_of(sample),
                "tokens": show_tokens(sample, layer["name"]),
                "pictures": [
                    show_picture(
                        picture,
                        self.pictures[place, index],
                        found,
                        f"Image {index + 1} of row {sample['row']}",
                    )
                    for index, (picture, found) in enumerate(zip(kept.pictures, patches, strict=False))
                ],
            }
            if shown["tokens"] or shown["pictures"]:
                groups.setdefault(sample["dataset"], []).append(shown)
        specialisation = [one | {"shares": self.shares(one, layer["num_experts"])} for one in layer["specialisation"]]
        return layer | {
            "groups": [{"dataset": name, "samples": samples} for name, samples in groups.items()],
            "has_nobody": any(load["tokens_of_no_expert"] for load in layer["loads"]),
            "co_activation": self.co_activation(layer),
            "specialisation": specialisation,
        }

    @staticmethod
    def co_activation(layer: dict[str, Any]) -> list[list[dict[str, str] | None]]:
        """The heat map of pairs; empty where there are none."""
        shares = layer["co_activation"]["share"]
        if not any(any(row) for row in shares):
            return []
        even = sum(map(sum, shares)) / max(len(shares) * (len(shares) - 1), 1)
        return [
            [None if row == column else cell(share, even) for column, share in enumerate(values)]
            for row, values in enumerate(shares)
        ]

    @staticmethod
    def shares(one: dict[str, Any], num_experts: int) -> list[dict[str, Any]]:
        """Each expert's tokens by label or class; what each got of the listed values, of all its tokens."""
        totals = one["totals"]
        even = [sum(counts) / max(sum(totals), 1) for counts in one["assignments"]]
        return [
            {
                "name": name,
                "cells": [
                    cell(counts[expert] / totals[expert], even[place]) if totals[expert] else None
                    for expert in range(num_experts)
                ],
            }
            for place, (name, counts) in enumerate(zip(one["values"], one["assignments"], strict=True))
        ]

    def render(self, first: str) -> str:
        """The page.

        Args:
            first: the layer that is shown first.
        """
        loader = FileSystemLoader(HERE, encoding="utf-8")
        made = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        made.globals |= {"number": number, "colour": colour, "ink": ink}
        return made.get_template("page.html").render(
            report=self.report,
            overview=self.overview(),
            panels=[self.panel(layer) for layer in self.report["layers"]],
            first=first,
            numbers_name=NUMBERS,
            style=Markup(self.style()),  # ours, and base64: nothing of the data's
            script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        )
