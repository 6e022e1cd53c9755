"""Receipts, histories and evaluations as conversions and runs write them, without the work."""

import json

from modeling_vlmoe.weight_fingerprint import count_parameters, fingerprint

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "layers": [0, 1, 2]}
SETTINGS = {
    "text_moe": MOE,
    "vision_moe": None,
    "connector_moe": None,
    "expert_init": "copy",
    "router_init": "uniform",
    "dtype": "float32",
    "casts": [{"parent": "vision", "source": "float32", "target": "bfloat16", "is_exact": False}],
    "num_image_tokens": 9,
}


def licence(name, **more):
    return None if name is None else {"license": name, **more}


def parent(name, licence=None, hub=True, **more):
    """A parent as a receipt describes it."""
    return {
        "name": name,
        "hub_id": name if hub else None,
        "revision": "0" * 40 if hub else None,
        "license": licence,
        "model_type": "llama",
        **more,
    }


def receipt(**parents):
    """A receipt with these parents."""
    return {
        "parents": parents,
        "seed": 7,
        "settings": SETTINGS,
        "parameters": {"total": 123456, "active": 78901},
        "proof": {"largest_gap": 1.4e-6, "largest_gap_limit": 1e-5},
        "versions": {"vlmoe": "0.1.0", "torch": "2.13.0"},
    }


def receipt_of(folder, **parents):
    """A receipt of the weights in a folder."""
    counts = {"total": count_parameters(folder), "active": 78901}
    return receipt(**parents) | {"parameters": counts, "weights": fingerprint(folder)}


def share(num_correct, count, **groups):
    """A result of `VQAExactMatch`, its interval made up."""
    accuracy = num_correct / count
    result = {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "count": count}
    return result | ({"groups": groups} if groups else {})


def put(folder, name, value):
    """Writes a JSON file."""
    (folder / name).write_text(json.dumps(value))
