"""Measuring a family of VLMs: a tiny dense one goes through the product's own conversion, sparse in every part that
can be, is loaded from its files, and is compared with itself: logits of text, and every MLP on random rows.

No processor is needed for that; the proof that `vlmoe upcycle` makes with one, on pictures, is left out.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.mlp_layouts import run_dense
from modeling_vlmoe.moe_config import PARTS, part_config, sparse_fields
from modeling_vlmoe.parts import find_connector, find_towers
from modeling_vlmoe.towers import find_dense_mlp

from ..arguments import UpcycleArguments
from ..gaps import measure_gap
from ..host_parents import check_dense_host
from ..host_planning import InPlacePlan, plan_in_place
from ..parents import BROKEN, Parent
from ..streaming import CheckpointReader, write_checkpoint
from .findings import NUM_EXPERTS, NUM_TOKENS, Finding, first_tokens, judged, one_line
from .table import CONVERTED, REFUSED, SPARSE
from .tiny_vlms import build_vlm

ROWS = 16  # random ones that every MLP is given


def open_host(folder: Path, config: Any) -> Parent:
    """A dense VLM's folder as a parent."""
    return Parent("vlm", folder.name, folder, None, config, CheckpointReader(folder))


def plan_parts(parent: Parent) -> tuple[InPlacePlan, dict[str, str]]:
    """The plan that makes as many parts sparse as can be, the LLM always, and why others stay dense.

    Raises:
        ValueError: when the LLM cannot be.
    """
    args, asked, reasons = UpcycleArguments(), {"text": {"num_experts": NUM_EXPERTS}}, {}
    plan = plan_in_place(args, asked, parent, processor=(None, None))
    for part in PARTS[1:]:
        try:
            more = asked | {part: {"num_experts": NUM_EXPERTS}}
            plan = plan_in_place(args, more, parent, processor=(None, None))
            asked = more
        except BROKEN as error:
            reasons[part] = one_line(error)
    return plan, reasons


def layouts_of_parts(dense: Any, config: Any) -> str:
    """How the MLPs that become experts are written, by part."""
    found = {}
    for part, (_, tower) in find_towers(dense).items():
        if (moe := config.moe(part)) is not None:
            names = dict.fromkeys(str(find_dense_mlp(tower, index).layout) for index in moe.layers)
            found[part] = "; ".join(names)
    if config.connector_moe is not None:
        found["connector"] = str(find_connector(dense).layout)
    return ", ".join(f"{part}: {names}" for part, names in found.items())


def mlp_gap(plan: InPlacePlan, dense: Any, sparse: Any) -> float:
    """The largest gap of an MLP on random rows."""
    gaps, generator = [0.0], torch.Generator().manual_seed(3)
    for path, mlp in plan.mlps.items():
        block = sparse.get_submodule(path)
        rows = torch.randn(1, ROWS, block.router.weight.shape[1], generator=generator)
        wanted = run_dense(dense.get_submodule(mlp.layout.source_path(path)), mlp.layout, rows)
        gaps.append(measure_gap(wanted, block(rows)))
    return max(gaps)


def convert(dense: Any, folder: Path) -> tuple[InPlacePlan, dict[str, str], Any]:
    """The dense VLM sparse in place, written and loaded as a user loads it; with the plan, and why parts stay dense.

    Raises:
        ValueError: as `plan_in_place`.
    """
    dense.save_pretrained(folder / "dense", save_original_format=False)
    plan, reasons = plan_parts(open_host(folder / "dense", dense.config))
    out = folder / "sparse"
    out.mkdir()
    write_checkpoint(out, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
    plan.config.save_pretrained(out)
    return plan, reasons, AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()


def measure_vlm(family: str, config: Any) -> Finding:
    """Measures a family of VLMs.

    Args:
        family: its model type.
        config: its configuration, as its class makes it.
    """
    try:
        text = part_config(config, "text")
        if declared := sparse_fields(text):
            return Finding(family, "vlm", SPARSE, reason=f"its LLM's configuration has {', '.join(declared)}")
        check_dense_host(family, config)
        dense: Any = build_vlm(family)
        tokens = first_tokens((2, NUM_TOKENS))
        wanted = dense(input_ids=tokens).logits
    except (*BROKEN, ImportError, StrictDataclassError) as error:
        return Finding(family, "vlm", REFUSED, reason=one_line(error))
    with tempfile.TemporaryDirectory() as folder:
        try:
            plan, reasons, sparse = convert(dense, Path(folder))
        except BROKEN as error:
            return Finding(family, "vlm", REFUSED, reason=one_line(error, Path(folder)))
        gap = max(measure_gap(wanted, sparse(input_ids=tokens).logits), mlp_gap(plan, dense, sparse))
    layouts = layouts_of_parts(dense, plan.config)
    reason = "; ".join(f"{part} stays dense: {why}" for part, why in reasons.items())
    return judged(Finding(family, "vlm", CONVERTED, gap, layouts, reason=reason))
