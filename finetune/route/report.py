"""The numbers of `vlmoe route`, as JSON values: what `routing.json` holds and the page is made of."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from modeling_vlmoe import __version__

from ..callbacks import MODALITIES, layer_name
from ..expert_similarity import experts_similarity, find_blocks
from ..router_load import Layer
from ..routing_alarms import PART_NAMES, Alarm, AlarmLimits, dead_alarm, identical_alarm, saturated_alarm
from .explanations import MEASURES
from .measures import (
    Tally,
    by_chance,
    count_by,
    load_entropy,
    merged,
    shared_information,
    table_by_chance,
)
from .run import RoutingRun, Sample
from .settings import RouteSettings
from .words import CLASSES

DECIMALS = 6
PART_ORDER = ("vision", "connector", "text")
MOST_LABELS = 12  # that are listed; the measure is of all


def rounded(value: Any) -> Any:
    """Numbers with few decimals, so that a result does not depend on the order of sums."""
    if isinstance(value, Tensor):
        return rounded(value.tolist())
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def order(layer: Layer) -> tuple[int, int]:
    """Layers as the data passes them: ViT, connector, LLM."""
    return PART_ORDER.index(layer[0]), -1 if layer[1] is None else layer[1]


def title(layer: Layer) -> str:
    """A layer as a heading: "LLM layer 17", "connector"."""
    part, index = layer
    return PART_NAMES[part] if index is None else f"{PART_NAMES[part]} layer {index}"


def describe_load(tally: Tally) -> dict[str, Any]:
    """A layer's load by the tokens of one modality."""
    total = max(int(tally.assigned_E.sum()), 1)
    return {
        "tokens": tally.tokens,
        "tokens_of_no_expert": tally.unserved,
        "assignments": tally.assigned_E.tolist(),
        "load": tally.assigned_E.double() / total,
        "open_experts": int(tally.open_E.sum()),
        "entropy": load_entropy(tally),
        "dead_experts": tally.dead,
        "top_probability": tally.mean_confidence,
    }


def by_label(tally: Tally, labels: list[str]) -> dict[str, Any]:
    """What experts tell about the samples' labels."""
    names = [name for name, _ in sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))]
    samples = sorted(tally.by_sample)
    count_SE = torch.stack([tally.by_sample[sample] for sample in samples])
    label_S = torch.tensor([names.index(labels[sample]) for sample in samples])
    count_LE = count_by(count_SE, label_S, len(names))
    return {
        "by": "label",
        "values": names[:MOST_LABELS],
        "num_values": len(names),
        "assignments": count_LE[:MOST_LABELS].tolist(),
        "totals": count_LE.sum(0).tolist(),
        "information": shared_information(count_LE),
        "by_chance": by_chance(count_SE, label_S, len(names)),
    }


def by_class(tally: Tally) -> dict[str, Any]:
    """What experts tell about the classes of words."""
    names = [name for name in CLASSES if name in tally.by_class]
    count_LE = torch.stack([tally.by_class[name] for name in names])
    return {
        "by": "word class",
        "values": names,
        "num_values": len(names),
        "assignments": count_LE.tolist(),
        "totals": count_LE.sum(0).tolist(),
        "information": shared_information(count_LE),
        "by_chance": table_by_chance(count_LE),
    }


def together(tally: Tally) -> dict[str, Any]:
    """Which experts are chosen together."""
    alone_E = tally.together_EE.diagonal().double().clamp(min=1)
    share_EE = tally.together_EE.double() / alone_E[:, None]
    return {"tokens": tally.together_EE.tolist(), "share": share_EE * (1 - torch.eye(len(share_EE)))}


def find_alarms(layer: Layer, by_modality: dict[str, Tally], distance: float | None) -> list[Alarm]:
    """What is wrong with a layer, by the rules that training has."""
    limits = AlarmLimits()
    total = merged(list(by_modality.values()))
    number = int(total.assigned_E.sum())
    idle_E = [number if expert in total.dead else 0 for expert in range(total.num_experts)]
    found = [dead_alarm(layer, idle_E, number, limits)]
    for modality, tally in by_modality.items():
        if tally.mean_confidence is not None:
            found.append(saturated_alarm(layer, tally.mean_confidence, tally.confidence[1], limits, modality))
    if distance is not None:
        found.append(identical_alarm(layer, distance, limits))
    return [alarm for alarm in found if alarm is not None]


def describe_layer(layer: Layer, run: RoutingRun, block: Any) -> tuple[dict[str, Any], list[Alarm]]:
    """All of one layer, and what is wrong with it."""
    tallies = {key[1:]: tally for key, tally in run.tallies.items() if key[0] == layer}
    similarity = experts_similarity(block.experts)
    loads, specialisation = [], []
    by_modality: dict[str, list[Tally]] = {}
    for name, labels in run.labels.items():
        for modality in MODALITIES.values():
            if (tally := tallies.get((name, modality))) is None:
                continue
            by_modality.setdefault(modality, []).append(tally)
            loads.append({"dataset": name, "modality": modality} | describe_load(tally))
            found = [by_label(tally, labels)] + ([by_class(tally)] if tally.by_class else [])
            specialisation += [{"dataset": name, "modality": modality} | one for one in found]
    totals = {modality: merged(found) for modality, found in by_modality.items()}
    described = {
        "name": layer_name(layer),
        "title": title(layer),
        "part": layer[0],
        "layer": layer[1],
        "num_experts": next(iter(totals.values())).num_experts,
        "router_type": block.router.moe.router_type,
        "similarity": None if similarity is None else similarity.cosine,
        "distance": None if similarity is None else similarity.distance,
        "loads": loads,
        "co_activation": together(merged(list(totals.values()))),
        "specialisation": specialisation,
    }
    return described, find_alarms(layer, totals, None if similarity is None else similarity.distance)


def describe_sample(sample: Sample, layers: list[Layer]) -> dict[str, Any]:
    """A sample that is shown."""
    return {
        "dataset": sample.dataset,
        "row": sample.row,
        "label": sample.label,
        "tokens": [None if token is None else {"text": token.text, "class": token.kind} for token in sample.tokens],
        "experts": {layer_name(layer): sample.experts[layer] for layer in layers if layer in sample.experts},
        "patches": {
            layer_name(layer): [
                None if found is None else {"rows": found[0], "columns": found[1], "experts": found[2]}
                for found in sample.patches[layer]
            ]
            for layer in layers
            if sample.patches.get(layer)
        },
    }


def build_report(
    run: RoutingRun, model_name: dict[str, Any], datasets: list[dict[str, Any]], settings: RouteSettings
) -> dict[str, Any]:
    """Everything, as JSON values.

    Args:
        run: after its last dataset.
        model_name: what the model is called, and its Hub id.
        datasets: the same of each source, with `rows`.
        settings: of the run.
    """
    blocks = find_blocks(run.body)
    layers = sorted({key[0] for key in run.tallies}, key=order)
    described, alarms = [], []
    for layer in layers:
        values, found = describe_layer(layer, run, blocks[layer])
        described.append(values)
        alarms += found
    return rounded(
        {
            "vlmoe": __version__,
            "model": model_name,
            "datasets": [one | {"samples": len(run.labels[one["label"]])} for one in datasets],
            "labels_are": "the answers" if settings.label_field is None else f"the field {settings.label_field!r}",
            "measures": MEASURES,
            "alarms": [{"kind": one.kind, "layer": layer_name(one.layer), "words": one.words} for one in alarms],
            "layers": described,
            "samples": [describe_sample(sample, layers) for sample in run.samples],
        }
    )
