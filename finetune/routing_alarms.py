"""What of a model's routing is wrong, in words: dead experts, experts that are still copies, a saturated router.

The one home of these rules: training (callbacks.py) and the page of `vlmoe route` (route/) read their figures alike.

>>> dead_alarm(("text", 17), idle_E=[0, 0, 4096, 3], num_assignments=4096, limits=AlarmLimits()).words
'Dead experts in layer 17 of the LLM: expert 2 of 4 got none of the last 4,096 assignments. Raise ...'
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

# A sparse layer: its part, and its index in the tower (None for the connector).
Layer = tuple[str, int | None]
PART_NAMES = {"text": "LLM", "vision": "ViT", "connector": "connector"}
DEAD, IDENTICAL, SATURATED = "dead experts", "identical experts", "saturated router"


@dataclass(frozen=True)
class AlarmLimits:
    """When an alarm is raised.

    Attributes:
        dead_after: an expert is dead when it got none of so many assignments in a row, times the number of experts:
            had each as good a chance, that would be a chance of e^-dead_after.
        identical_after: in training, the optimizer steps after which experts that are trained should differ.
        identical_distance: experts are identical when their mean distance, divided by their mean norm, is at most
            this; a LoRA adapter's first hundred steps move them a thousand times as far.
        saturated_above: a router is saturated when the mean of its tokens' largest shares is above this: then the
            softmax passes hardly any gradient on.
        saturated_tokens: of so many tokens at least.
    """

    dead_after: int = 200
    identical_after: int = 200
    identical_distance: float = 1e-6
    saturated_above: float = 0.99
    saturated_tokens: int = 1000


def alarm_limits(steps: int) -> AlarmLimits:
    """The limits of a run that is to say after so many steps that experts are identical; 0: never."""
    return AlarmLimits(identical_after=steps or sys.maxsize)


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong.

    Attributes:
        kind: DEAD, IDENTICAL or SATURATED.
        layer: where.
        words: what, with the figures, and what to do.
        modality: "image" or "text", where it is of one.
    """

    kind: str
    layer: Layer
    words: str
    modality: str | None = None

    @property
    def key(self) -> tuple[str, Layer, str | None]:
        """What is said once."""
        return self.kind, self.layer, self.modality


def where(layer: Layer) -> str:
    """A layer in a sentence: "layer 17 of the LLM", "the connector"."""
    part, index = layer
    return f"the {PART_NAMES[part]}" if index is None else f"layer {index} of the {PART_NAMES[part]}"


def _experts(experts: Sequence[int], num_experts: int) -> str:
    shown = ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")
    return f"{'expert' if len(experts) == 1 else 'experts'} {shown} of {num_experts}"


def dead_alarm(
    layer: Layer, idle_E: Sequence[int], num_assignments: int, limits: AlarmLimits, modality: str | None = None
) -> Alarm | None:
    """Experts that get nothing.

    Args:
        layer: where.
        idle_E: for each expert, the assignments that the layer made since it last got one; 0 for an expert that is
            closed to these tokens.
        num_assignments: all that were counted.
        limits: when it is one.
        modality: of which tokens, where not of all.
    """
    dead = [expert for expert, idle in enumerate(idle_E) if idle >= limits.dead_after * len(idle_E)]
    if not dead:
        return None
    least = min(idle_E[expert] for expert in dead)
    of_tokens = "" if modality is None else f" of {modality} tokens"
    words = (
        f"Dead experts in {where(layer)}: {_experts(dead, len(idle_E))} got none of the last {least:,} "
        f"assignments{of_tokens}. Raise router_aux_loss_coef, lower the learning rate of the routers, or use fewer "
        "experts."
    )
    return Alarm(DEAD, layer, words, modality)


def identical_alarm(layer: Layer, distance: float, limits: AlarmLimits, steps: int | None = None) -> Alarm | None:
    """Experts that are copies of one another.

    Args:
        layer: where.
        distance: see `expert_similarity.Similarity`.
        limits: when it is one.
        steps: optimizer steps that these experts were trained for; None where that is not known.
    """
    if distance > limits.identical_distance or (steps is not None and steps < limits.identical_after):
        return None
    since = "" if steps is None else f" after {steps:,} steps"
    advice = (
        "Train them (an adapter has to reach the experts: lora_targets, or lora_config), or upcycle with an expert "
        "init that makes them differ."
        if steps is None
        else "Raise the learning rate, train in float32 (bfloat16 rounds small steps away), or upcycle with an expert "
        "init that makes them differ."
    )
    words = (
        f"Experts still identical in {where(layer)}{since}: their weights are {distance:.1e} of their norm apart. "
        f"{advice}"
    )
    return Alarm(IDENTICAL, layer, words)


def saturated_alarm(
    layer: Layer, confidence: float, num_tokens: int, limits: AlarmLimits, modality: str | None = None
) -> Alarm | None:
    """A router that is sure of every token.

    Args:
        layer: where.
        confidence: the mean of the tokens' largest shares, of tokens with a choice.
        num_tokens: how many these were.
        limits: when it is one.
        modality: of which tokens.
    """
    if confidence <= limits.saturated_above or num_tokens < limits.saturated_tokens:
        return None
    of_tokens = "" if modality is None else f" {modality}"
    words = (
        f"Router saturated in {where(layer)}: its mean top probability is {confidence:.3f} over {num_tokens:,}"
        f"{of_tokens} tokens, so it hardly learns. Raise router_z_loss_coef, lower the learning rate of the routers, "
        "or set router_logit_norm."
    )
    return Alarm(SATURATED, layer, words, modality)
