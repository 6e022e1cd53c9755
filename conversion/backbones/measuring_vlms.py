"""Measuring a family of VLMs: a tiny dense one goes through the product's own conversion, sparse in every part that
can be, is loaded from its files, and is compared with itself: logits of text, logits of an image and text, and every
MLP on random rows.

The image is raw tensors of the shapes that the family's processor makes (vlm_inputs.py): no processor is needed.
A family is refused by the conversion's own words alone. What could not be made or run here is not measured.
"""

import re
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
from ..gaps import Findings, ProofError, nudge
from ..host_parents import check_dense_host
from ..host_planning import InPlacePlan, plan_in_place
from ..parents import BROKEN, Parent
from ..streaming import CheckpointReader, write_checkpoint
from .findings import NUM_EXPERTS, Finding, one_line
from .table import CONVERTED, NOT_MEASURED, REFUSED, SPARSE
from .tiny_vlms import build_vlm
from .vlm_inputs import NEED_AN_IMAGE
from .vlm_runs import check_effects, judge_logits, run_image, run_text

ROWS = 16  # random ones that every MLP is given
NO_TEXT_ALONE = "it takes no text without an image: without one its MLPs alone are compared"
MISSING_PACKAGE = re.compile(r"requires the (\S+) library")  # how transformers says it


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
        except ValueError as error:
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


def plan_folder(dense: Any, folder: Path) -> tuple[InPlacePlan, dict[str, str]]:
    """Writes a dense VLM into a folder, and plans as `plan_parts`.

    Raises:
        ValueError: as `plan_parts`.
    """
    dense.save_pretrained(folder / "dense", save_original_format=False)
    return plan_parts(open_host(folder / "dense", dense.config))


def write_sparse(plan: InPlacePlan, folder: Path) -> Any:
    """The planned VLM, written into a folder and loaded as a user loads it."""
    out = folder / "sparse"
    out.mkdir()
    write_checkpoint(out, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
    plan.config.save_pretrained(out)
    return AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()


def convert(dense: Any, folder: Path) -> tuple[InPlacePlan, dict[str, str], Any]:
    """The dense VLM sparse in place, written and loaded; with the plan, and why parts stay dense.

    Raises:
        ValueError: as `plan_parts`.
    """
    plan, reasons = plan_folder(dense, folder)
    return plan, reasons, write_sparse(plan, folder)


def measure_converted(family: str, dense: Any, sparse: Any, plan: InPlacePlan, dense_parts: dict[str, str]) -> Finding:
    """Measures a tiny VLM against the dense one that it was made of.

    Args:
        family: its model type.
        dense: the dense VLM.
        sparse: what was written, loaded.
        plan: of the conversion.
        dense_parts: why parts stay dense.

    Raises:
        ProofError: when what was written gives other answers.
        ValueError: when it can be given neither text nor an image, or experts are bypassed.
    """
    findings, needs_image = Findings(), family in NEED_AN_IMAGE
    judge_mlps(findings, plan, dense, sparse)
    if not needs_image:
        judge_logits(findings, run_text(dense), dense, sparse)
    worst, said = findings.largest, [f"{part} stays dense: {why}" for part, why in dense_parts.items()]
    said = [NO_TEXT_ALONE, *said] if needs_image else said
    layouts = layouts_of_parts(dense, plan.config)
    finding = Finding(family, "vlm", CONVERTED, worst.gap, layouts, reason="; ".join(said), floor=worst.floor)
    try:
        run = run_image(family, dense)
    except BROKEN as error:
        if needs_image:
            raise
        return replace(finding, reason="; ".join([f"images not run: {one_line(error)}", *said]))
    image = judge_logits(findings, run, dense, sparse)
    check_effects(run, sparse, plan.mlps)
    return replace(finding, reads=run.form, image_gap=image.gap, image_floor=image.floor)


def measure_dense(family: str, dense: Any, folder: Path) -> Finding:
    """Converts a tiny dense VLM, and measures what comes out.

    Args:
        family: its model type.
        dense: the VLM.
        folder: an empty one, to write into.
    """
    try:
        plan, dense_parts = plan_folder(dense, folder)
    except ValueError as error:
        return Finding(family, "vlm", REFUSED, reason=one_line(error, folder))
    try:
        return measure_converted(family, dense, write_sparse(plan, folder), plan, dense_parts)
    except ProofError as error:
        return Finding(family, "vlm", REFUSED, reason=one_line(error, folder))


def why_not_made(error: BaseException) -> str:
    """Why there is no tiny model of a family: the package that it needs, or what transformers says."""
    missing = MISSING_PACKAGE.search(str(error)) if isinstance(error, ImportError) else None
    if missing is not None:
        return f"needs {missing[1]}, which was not installed"
    return f"no tiny one could be made: {one_line(error)}"


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
    except ValueError as error:
        return Finding(family, "vlm", REFUSED, reason=one_line(error))
    try:
        dense: Any = build_vlm(family)
    except (*BROKEN, ImportError, StrictDataclassError) as error:
        return Finding(family, "vlm", NOT_MEASURED, reason=why_not_made(error))
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure_dense(family, dense, Path(folder))
        except BROKEN as error:
            said = one_line(error, Path(folder))
            return Finding(family, "vlm", NOT_MEASURED, reason=f"a tiny one could not be compared: {said}")
