"""Measuring a family of VLMs: a tiny dense one goes through the product's own conversion, sparse in every part that
can be, is loaded from its files, and is compared with itself: logits of text, logits of an image and text, and every
MLP on random rows.

The image is raw tensors of the shapes that the family's processor makes (vlm_inputs.py): no processor is needed.
"""

import tempfile
from dataclasses import replace
from functools import partial
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
from ..gaps import Findings, nudge
from ..host_parents import check_dense_host
from ..host_planning import InPlacePlan, plan_in_place
from ..parents import BROKEN, Parent
from ..streaming import CheckpointReader, write_checkpoint
from .findings import NUM_EXPERTS, Finding, one_line
from .table import CONVERTED, REFUSED, SPARSE
from .tiny_vlms import build_vlm
from .vlm_runs import check_effects, judge_logits, run_image, run_text

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


def judge_mlps(findings: Findings, plan: InPlacePlan, dense: Any, sparse: Any) -> None:
    """Judges every MLP on random rows.

    Raises:
        ProofError: naming the one whose gap is too large.
    """
    generator = torch.Generator().manual_seed(3)
    for path, mlp in plan.mlps.items():
        block = sparse.get_submodule(path)
        rows = torch.randn(1, ROWS, block.router.weight.shape[1], generator=generator)
        run = partial(run_dense, dense.get_submodule(mlp.layout.source_path(path)), mlp.layout)
        nudged = partial(run, nudge(rows, generator))
        findings.judge(f"{path} on random rows", run(rows), block(rows), nudged)


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


def measure_dense(family: str, dense: Any, folder: Path) -> Finding:
    """Measures a tiny dense VLM that answers to text.

    Args:
        family: its model type.
        dense: the VLM.
        folder: an empty one, to write it into.

    Raises:
        ValueError: when it cannot be converted, when what was written gives other answers, or experts are bypassed.
    """
    plan, reasons, sparse = convert(dense, folder)
    findings = Findings()
    judge_mlps(findings, plan, dense, sparse)
    judge_logits(findings, run_text(dense), dense, sparse)
    worst, said = findings.largest, [f"{part} stays dense: {why}" for part, why in reasons.items()]
    layouts = layouts_of_parts(dense, plan.config)
    finding = Finding(family, "vlm", CONVERTED, worst.gap, layouts, reason="; ".join(said), floor=worst.floor)
    try:
        run = run_image(family, dense)
    except BROKEN as error:
        return replace(finding, reason="; ".join([f"images not run: {one_line(error)}", *said]))
    image = judge_logits(findings, run, dense, sparse)
    check_effects(run, sparse, plan.mlps)
    return replace(finding, reads=run.form, image_gap=image.gap, image_floor=image.floor)


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
        run_text(dense)
    except (*BROKEN, ImportError, StrictDataclassError) as error:
        return Finding(family, "vlm", REFUSED, reason=one_line(error))
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure_dense(family, dense, Path(folder))
        except BROKEN as error:
            return Finding(family, "vlm", REFUSED, reason=one_line(error, Path(folder)))
