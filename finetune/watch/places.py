"""What a module or a parameter is called in a sentence: "the router of layer 3 of the LLM"."""

import re
from typing import Any

from torch import nn

from modeling_vlmoe.parts import find_towers, has_layers, text_root, word_embedding
from modeling_vlmoe.towers import tower_layers

from ..router_load import find_body
from ..routing_alarms import PART_NAMES, where

# What a piece of a name says; the first that matches.
KINDS = (
    (r"router", "router"),
    (r"shared_expert", "shared expert"),
    (r"experts|deltas", "experts"),
    (r"attn|attention", "attention"),
    (r"norm", "norm"),
    (r"mlp|feed_forward|ffn|\bfc\d", "MLP"),
)
ADAPTER = re.compile(r"lora_|adapter")


class Places:
    """The places of a model, found once.

    Args:
        model: a vlmoe model, also wrapped by PEFT.
    """

    def __init__(self, model: nn.Module):
        body = find_body(model)
        named: dict[nn.Module, str] = {}
        for part, (_, tower) in find_towers(body).items():
            named[tower] = f"the {PART_NAMES[part]}"
            if has_layers(tower):
                for index, layer in enumerate(tower_layers(tower)[1]):
                    named[layer] = where((part, index))
        named[text_root(body)] = "the LLM"
        named[word_embedding(body)] = "the word embeddings of the LLM"
        if (connector := getattr(body, "connector", None)) is not None:
            named[connector] = "the connector"
        head: Any = next((one for one in model.modules() if hasattr(one, "get_output_embeddings")), None)
        if head is not None and (output := head.get_output_embeddings()) is not None:
            named[output] = "the head"
        self.paths = {path: named[module] for path, module in model.named_modules() if module in named}

    def __call__(self, name: str) -> str:
        """What a module or a parameter is called, by its dotted name in the model."""
        holders = [path for path in self.paths if name == path or name.startswith(f"{path}.")]
        holder = max(holders, key=len, default=None)
        if holder is None:
            return name
        rest = name.removeprefix(holder).lstrip(".")
        kind = next((word for pattern, word in KINDS if re.search(pattern, rest)), None)
        adapter = "the adapter on " if ADAPTER.search(rest) else ""
        what = self.paths[holder] if kind is None else f"the {kind} of {self.paths[holder]}"
        return f"{adapter}{what} ({name})"
