"""`upcycle_receipt.json`: what a checkpoint was made of, how, and what the proof measured; no path of the machine."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modeling_vlmoe import __version__
from modeling_vlmoe.companions import RECEIPT_NAME
from modeling_vlmoe.model_cards.side_files import read_side_file
from modeling_vlmoe.moe_config import PARTS

from .assignments import ROUTER
from .casts import find_casts
from .connector_init import DrawnConnector
from .gaps import FLOOR_FACTOR, LIMIT, Findings
from .licences import read_licence
from .mapping import Mapping
from .parents import Parent, is_on_hub
from .plans import UpcyclePlan

PACKAGES = ("torch", "transformers", "safetensors")
# A change of the receipt's shape that a reader has to know of raises this.
FORMAT = 1


def describe_parent(parent: Parent) -> dict[str, Any]:
    """A parent: its Hub id and commit, or its folder's name; its licence, as its card states it; its files' sizes and
    the hash of its configuration; of a vlmoe model that has a receipt, the parents that this one names.
    """
    is_hub = is_on_hub(parent)
    described = {
        "name": parent.given if is_hub else parent.folder.resolve().name,
        "hub_id": parent.given if is_hub else None,
        "revision": parent.revision,
        "license": read_licence(parent),
        "model_type": parent.config.model_type,
        "config_sha256": hashlib.sha256((parent.folder / "config.json").read_bytes()).hexdigest(),
        "files": {file.name: file.stat().st_size for file in parent.reader.files},
    }
    if (parent.folder / RECEIPT_NAME).is_file():
        described["parents"] = read_side_file(parent.folder, RECEIPT_NAME).get("parents") or {}
    return described


def describe_settings(plan: UpcyclePlan) -> dict[str, Any]:
    """The resolved settings: no default is left open."""
    config = plan.config
    moe = {part: None if config.moe(part) is None else config.moe(part).to_dict() for part in PARTS}
    return {
        **{f"{part}_moe": value for part, value in moe.items()},
        "expert_init": plan.drawing.expert_init,
        "router_init": plan.drawing.router_init,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "casts": [asdict(cast) for cast in find_casts(plan)],
        **plan.describe_images(),
    }


def describe_mapping(mapping: Mapping) -> dict[str, Any]:
    """How many tensors were used, dropped (and why) and are new."""
    operations = Counter(assignment.operation for assignment in mapping.assignments)
    dense = [tensor for assignment in mapping.assignments for tensor in assignment.dense]
    num_drawn = sum(isinstance(tensor.source, DrawnConnector) for tensor in dense)
    return {
        "used": len(dense) - num_drawn,
        "new": {"router": sum(ROUTER in one.spec.name for one in mapping.assignments), "connector": num_drawn},
        "targets": dict(sorted(operations.items())),
        "dropped": {role: dict(Counter(reasons.values())) for role, reasons in mapping.dropped.items()},
        "dropped_tensors": {role: sorted(reasons) for role, reasons in mapping.dropped.items() if reasons},
    }


def describe_proof(findings: Findings) -> dict[str, Any]:
    """What was judged, each beside its limit, and what was only measured."""
    gaps = {
        what: {name: value for name, value in asdict(one).items() if value is not None}
        for what, one in findings.judged.items()
    }
    return {
        "limit": LIMIT,
        "floor_factor": FLOOR_FACTOR,
        "largest_gap": findings.largest.gap,
        "largest_gap_limit": findings.largest.limit,
        "gaps": gaps,
        "informative": findings.informative,
        **({"lossy": findings.lossy} if findings.lossy else {}),
    }


def build_receipt(
    plan: UpcyclePlan, findings: Findings, file_hashes: dict[str, str], weights: str | None
) -> dict[str, Any]:
    """The receipt as JSON values; `weights` is the fingerprint of what was written."""
    return {
        "format": FORMAT,
        "parents": {role: describe_parent(parent) for role, parent in plan.parents.items()},
        "seed": plan.drawing.seed,
        "settings": describe_settings(plan),
        "parameters": {"total": plan.mapping.num_parameters, "active": plan.mapping.num_active_parameters},
        "mapping": describe_mapping(plan.mapping),
        "proof": describe_proof(findings),
        "files_sha256": file_hashes,
        "weights": weights,
        "versions": {"vlmoe": __version__, **{package: version(package) for package in PACKAGES}},
    }


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """Writes the receipt into a checkpoint."""
    text = json.dumps(receipt, indent=2, ensure_ascii=False) + "\n"
    (folder / RECEIPT_NAME).write_text(text, encoding="utf-8")
