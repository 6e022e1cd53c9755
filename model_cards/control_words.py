"""What a card says of the dense control that was trained beside a model."""

import json

from modeling_vlmoe.finetune.control.tables import control_table, match_words, spread_words

from .facts import CardFacts


def describe_control(facts: CardFacts) -> str | None:
    """The model beside the dense one of the same tokens, and their difference; None where none was trained."""
    found = facts.control
    if found is None:
        return None
    changes = {one["name"]: one["differs"] for one in found["stages"] if one.get("differs")}
    told = "; ".join(f"{name}: `{json.dumps(values)}`" for name, values in changes.items())
    text = [
        "### Beside the dense model",
        f"{match_words(found)} Measured on {found['data'].get('name') or 'data whose name is not known'}.",
        control_table(found),
        spread_words(found),
        f"What the control was told otherwise: {told}." if told else None,
    ]
    return "\n\n".join(filter(None, text))
