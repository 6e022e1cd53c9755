"""`upcycle_receipt.json`: what a checkpoint was made of, how, and what the proof measured; no path of the machine."""

import hashlib
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from modeling_vlmoe import __version__
from modeling_vlmoe.configuration_vlmoe import PARTS

from .connector_init import DrawnConnector
from .mapping import Mapping
from .parents import Parent
from .planning import UpcyclePlan
from .verify import LIMIT

RECEIPT_NAME = "upcycle_receipt.json"
PACKAGES = ("torch", "transformers", "safetensors")
# A change of the receipt's shape that a reader has to know of raises this.
FORMAT = 1


def describe_parent(parent: Parent) -> dict[str, Any]:
    """A parent: its Hub id and commit, or its folder's name; its files' sizes and the hash of its configuration."""
    is_hub = parent.revision is not None and not Path(parent.given).is_dir()
    return {
        "name": parent.given if is_hub else parent.folder.resolve().name,
        "revision": parent.revision,
        "model_type": parent.config.model_type,
        "config_sha256": hashlib.sha256((parent.folder / "config.json").read_bytes()).hexdigest(),
        "files": {file.name: file.stat().st_size for file in parent.reader.files},
    }


def describe_settings(plan: UpcyclePlan) -> dict[str, Any]:
    """The resolved settings: no default is left open."""
    config = plan.config
    moe = {part: None if config.moe(part) is None else config.moe(part).to_dict() for part in PARTS}
    return {
        **{f"{part}_moe": value for part, value in moe.items()},
        "expert_init": plan.drawing.expert_init,
        "router_init": plan.drawing.router_init,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "casts": find_casts(plan),
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_token": plan.processor.image_token,
        "image_token_id": config.image_token_id,
        "num_image_tokens": plan.processor.num_image_tokens,
        "vocabulary_rows": {
            "parent": plan.dense_config.text_config.vocab_size,
            "written": config.text_config.vocab_size,
        },
    }


def find_casts(plan: UpcyclePlan) -> dict[str, str]:
    """For each parent whose tensors were cast: from what to what, and whether that loses digits."""
    casts: dict[str, str] = {}
    for role, dense in plan.dense.items():
        for dtype in sorted({dense.dtype(name) for name in dense.names} - {plan.dtype}, key=str):
            if dtype.is_floating_point:
                is_exact = torch.promote_types(dtype, plan.dtype) == plan.dtype
                source, target = str(dtype).removeprefix("torch."), str(plan.dtype).removeprefix("torch.")
                casts[role] = f"{source} to {target}, {'exact' if is_exact else 'rounded'}"
    return casts


def describe_mapping(mapping: Mapping) -> dict[str, Any]:
    """How many tensors were used, dropped (and why) and are new."""
    operations = Counter(assignment.operation for assignment in mapping.assignments)
    dense = [tensor for assignment in mapping.assignments for tensor in assignment.dense]
    num_drawn = sum(isinstance(tensor.source, DrawnConnector) for tensor in dense)
    return {
        "used": len(dense) - num_drawn,
        "new": {"router": operations["router"], "connector": num_drawn},
        "targets": dict(sorted(operations.items())),
        "dropped": {role: dict(Counter(reasons.values())) for role, reasons in mapping.dropped.items()},
        "dropped_tensors": {role: sorted(reasons) for role, reasons in mapping.dropped.items() if reasons},
    }


def build_receipt(plan: UpcyclePlan, gaps: dict[str, float], file_hashes: dict[str, str]) -> dict[str, Any]:
    """The receipt as JSON values."""
    return {
        "format": FORMAT,
        "parents": {role: describe_parent(parent) for role, parent in plan.parents.items()},
        "seed": plan.drawing.seed,
        "settings": describe_settings(plan),
        "parameters": {"total": plan.mapping.num_parameters, "active": plan.mapping.num_active_parameters},
        "mapping": describe_mapping(plan.mapping),
        "proof": {"limit": LIMIT, "largest_gap": max(gaps.values()), "gaps": gaps},
        "files_sha256": file_hashes,
        "versions": {"vlmoe": __version__, **{package: version(package) for package in PACKAGES}},
    }


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """Writes the receipt into a checkpoint."""
    text = json.dumps(receipt, indent=2, ensure_ascii=False) + "\n"
    (folder / RECEIPT_NAME).write_text(text, encoding="utf-8")
