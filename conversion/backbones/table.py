"""The table of backbones that was measured, as data and as a page. Reading it imports neither torch nor transformers.

`backbones.json` is written by `vlmoe backbones --measure --write`; `docs/backbones.md` is rendered from it.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("backbones.json")
PARTS = ("text", "vision", "vlm")
CONVERTED, REFUSED, SPARSE, OTHER = "converted", "refused", "already sparse", "not a decoder or ViT"
NOT_MEASURED = "not measured"
KINDS = (CONVERTED, REFUSED, NOT_MEASURED, SPARSE, OTHER)
NAMES = {"text": "LLMs", "vision": "ViTs", "vlm": "VLMs"}
LONGEST = 300  # letters of a reason in the page; the command gives the whole of it
INTRODUCTION = """\
# Backbones

<!-- Rendered from conversion/backbones/backbones.json by `vlmoe backbones --measure --write`; do not edit. -->

Every configuration that transformers {version} registers for `AutoModelForCausalLM`, for a model that reads images, or
for `AutoModelForImageTextToText`, as `vlmoe backbones` prints it. A tiny model of each family, every parameter of it
drawn wide, goes through the conversion: {text} text families, {vision} vision families and {vlm} whole VLMs are
converted. `vlmoe backbones FAMILY` says more about one, and
with `--measure` measures it again on the transformers that is installed.

The gap is the largest difference to the dense model, in standard deviations of its result; 1e-05 is allowed. Of an
LLM it is that of the logits of the written checkpoint, loaded as a user loads it. Of a ViT it is that of everything
the tower gives, made sparse in every layer, on whatever it reads; "in a model" is the gap of what it gives inside a
written vision-language model, which answers to a picture through its own processor. A ViT of which only the tower
can be made sparse is refused. Of a VLM, which stays in its own class (`--vlm-model`; a LLaVA becomes our own
composite), it is that of the logits of text, and of every MLP on random rows, sparse in each part that can be; a
part that stays dense has its reason. A VLM that takes no text without an image, as its remark says, is compared
there on its MLPs alone. "With an image" is the gap of the logits of an image and text, the image in the form that is
named: tensors as its processor makes them. Without the experts of any one MLP these logits are others: none is
bypassed. What has no such gap has its reason ("images not run"). VLMs are judged as in every proof of a conversion:
where the dense one itself answers the last bit of its input with more than the limit, three times this rounding is
allowed; it is given then.

- **converted**: a tiny one was, within the gap.
- **refused**: the reason is what the conversion says, on these tiny models.
- **not measured**: no tiny one could be made or compared where this was measured, for the reason that is given; the
  conversion may take it, and proves what it writes in any case.
- **already sparse**: its configuration has experts of its own (`vlmoe import` keeps those of some families).
- **not a decoder or ViT**: encoders, models with an encoder, models that are put together from others (give one of
  these), convolutional and hierarchical networks.
"""


def read_table() -> dict[str, Any]:
    """The measured table: `transformers`, its version, and `findings`, a list of rows."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def write_table(version: str, findings: Iterable[dict[str, Any]], path: Path = DATA) -> None:
    """Writes the table, one row to a line."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in findings)
    path.write_text(f'{{"transformers": "{version}", "findings": [\n{rows}\n]}}\n', encoding="utf-8")


def check_known(names: Iterable[str], known: Iterable[str], version: str) -> None:
    """Refuses families that a version of transformers does not have.

    Raises:
        ValueError: naming them.
    """
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"transformers {version} has no text, vision or VLM family {', '.join(unknown)}; `vlmoe backbones` shows "
            "those it has. Check the name: it is the model_type of a config.json."
        )


def select(findings: Iterable[dict[str, Any]], part: str, kind: str) -> list[dict[str, Any]]:
    """The rows of a part and a kind."""
    return [row for row in findings if row["part"] == part and row["kind"] == kind]


def show_gap(gap: float | None, floor: float | None = None) -> str:
    """A gap in two digits, with the dense model's own rounding where it was judged by that."""
    rounding = "" if floor is None else f" (rounding {show_gap(floor)})"
    return "" if gap is None else f"{gap:.1e}{rounding}"


def shorten(reason: str) -> str:
    """A reason that fits into a page."""
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST].rsplit(' ', 1)[0]} ..."


def count_kinds(findings: Iterable[dict[str, Any]]) -> dict[str, Counter]:
    """How many families of each part are of each kind."""
    counts: dict[str, Counter] = {part: Counter() for part in PARTS}
    for row in findings:
        counts[row["part"]][row["kind"]] += 1
    return counts


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _reason(row: dict[str, Any]) -> str:
    """Why a family is not converted; the gap of its tower where that could be made sparse."""
    tower = f" (Its tower alone can be made sparse in memory: gap {show_gap(row['gap'])}.)" if "gap" in row else ""
    return shorten(row["reason"]) + tower


def _converted(part: str, rows: list[dict[str, Any]]) -> list[str]:
    if part == "text":
        of_text = [(row["family"], show_gap(row.get("gap")), row["layouts"]) for row in rows]
        return _rows(("family", "gap of logits", "how its MLPs are written"), of_text)
    if part == "vlm":
        head = ("family", "without an image", "with an image", "given as", "how the MLPs of its parts are written")
        of_vlm = [
            (
                row["family"],
                show_gap(row["gap"], row.get("floor")),
                show_gap(row.get("image_gap"), row.get("image_floor")),
                row.get("reads", ""),
                row["layouts"],
                shorten(row.get("reason", "")),
            )
            for row in rows
        ]
        return _rows((*head, "remarks"), of_vlm)
    cells = [
        (row["family"], row["reads"], show_gap(row["gap"]), show_gap(row["whole"]), row["layouts"]) for row in rows
    ]
    return _rows(("family", "reads", "gap of the tower", "in a model", "how its MLPs are written"), cells)


def render_page(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    findings = table["findings"]
    counts = count_kinds(findings)
    converted = {part: str(counts[part][CONVERTED]) for part in PARTS}
    lines = [INTRODUCTION.format(version=table["transformers"], **converted)]
    for part in PARTS:
        for kind in KINDS:
            rows = select(findings, part, kind)
            if not rows:
                continue
            lines += [f"## {NAMES[part]}: {kind} ({len(rows)})", ""]
            if kind == CONVERTED:
                lines += _converted(part, rows)
            else:
                lines += _rows(("family", "why"), [(row["family"], _reason(row)) for row in rows])
            lines.append("")
    return "\n".join(lines)


def describe(row: dict[str, Any]) -> str:
    """All that is known about one family."""
    lines = [f"{row['family']} ({row['part']}): {row['kind']}"]
    if "gap" in row:
        lines.append(f"  gap {show_gap(row['gap'], row.get('floor'))} standard deviations")
    if "layouts" in row:
        lines.append(f"  MLPs: {row['layouts']}")
    if "image_gap" in row:
        gap = show_gap(row["image_gap"], row.get("image_floor"))
        lines.append(f"  with an image, given as {row['reads']}: gap {gap}")
    elif "reads" in row:
        lines.append(f"  reads {row['reads']}")
    if row["part"] == "vision" and row["kind"] == CONVERTED:
        lines.append(f"  in a vision-language model: gap {show_gap(row['whole'])}")
    if "reason" in row:
        lines.append(f"  {row['reason']}")
    return "\n".join(lines)


def render_list(table: dict[str, Any]) -> str:
    """The table for a terminal: families by part and kind."""
    lines = [f"Measured on transformers {table['transformers']}; `vlmoe backbones FAMILY` says more."]
    for part in PARTS:
        for kind in KINDS:
            rows = select(table["findings"], part, kind)
            if rows:
                lines += ["", f"{NAMES[part]}: {kind} ({len(rows)})"]
                lines.append("  " + " ".join(row["family"] for row in rows))
    return "\n".join(lines)
