"""The experts of the parts of a vision-language model, in its configuration: what `VLMoEConfig` and the configurations
of a host's VLM made sparse in place have in common.

    >>> config.moe("text").layers, part_config(config, "text").num_experts_per_tok
    ([0, 1, 2, 3], 2)
"""

from copy import deepcopy
from typing import Any

from .moe_config import (
    DEFAULT_NUM_EXPERTS,
    HOSTED_FIELDS,
    PARTS,
    HostedMoEConfig,
    MoEConfig,
    check_counts,
    check_layers,
    complete_fields,
    part_config,
    said_of,
    sparse_fields,
    stated_fields,
)
from .router_config import check_per_layer

MODEL_TYPE = "vlmoe"
_GENERATION = "modeling_vlmoe.VLMoEForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_vlmoe.VLMoEConfig",
    "AutoModel": "modeling_vlmoe.VLMoEModel",
    "AutoModelForImageTextToText": _GENERATION,
    "AutoModelForMultimodalLM": _GENERATION,
    "AutoModelForCausalLM": _GENERATION,
    "AutoModelForSequenceClassification": "modeling_vlmoe.VLMoEForSequenceClassification",
}
# What the outputs have beside the tokens' logits; trainers leave it out of predictions.
ROUTING_OUTPUTS = ("router_logits", "vision_router_logits", "connector_router_logits", "router_losses", "aux_loss")
# What configurations call a tower's number of layers, and the hidden states of the ViT that the connector reads.
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers")
FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")


def merges_patches(vision_config: Any) -> bool:
    """Whether the ViT joins neighbouring patches behind its last layer, as Qwen's do: that is what is read then."""
    return hasattr(vision_config, "spatial_merge_size") and hasattr(vision_config, "out_hidden_size")


def feature_layers(config: Any) -> list[int]:
    """The hidden states of the ViT that the connector reads; the last one where the configuration names none."""
    chosen = next((value for name in FEATURE_LAYERS if (value := getattr(config, name, None)) is not None), -1)
    return [chosen] if isinstance(chosen, int) else list(chosen)


def num_layers(config: Any) -> int:
    """How many layers a tower has, by its configuration.

    Raises:
        ValueError: if it does not say.
    """
    for name in DEPTHS:
        if isinstance(depth := getattr(config, name, None), int):
            return depth
    raise ValueError(
        f"A {config.model_type} configuration names no number of layers ({', '.join(DEPTHS)}), so it cannot be said "
        "which carry experts. Leave this part dense."
    )


def num_feature_layers(config: Any) -> int:
    """How many layers of the ViT feed the feature layer that the connector reads.

    Raises:
        ValueError: if `vision_feature_layer` is out of range, or not the last of a ViT that merges patches behind it.
    """
    vision = part_config(config, "vision")
    depth, indices = num_layers(vision), feature_layers(config)
    chosen: Any = indices[0] if len(indices) == 1 else indices
    if merges_patches(vision) and indices != [-1]:
        raise ValueError(
            f"vision_feature_layer is {chosen}, but a {vision.model_type} merges patches behind its "
            "last layer, and the connector reads what it gives then. Leave vision_feature_layer out."
        )
    if not indices or any(not -depth - 1 <= index <= depth for index in indices):
        raise ValueError(
            f"vision_feature_layer is {chosen}, but the vision tower has {depth} layers, so its hidden states are "
            f"{-depth - 1} to {depth} (0 is the embeddings, {depth} or -1 the last layer's output). "
            "Choose among these."
        )
    return max(index % (depth + 1) for index in indices)


class PartsConfig:
    """The parts of a configuration: `text_moe`, `vision_moe` and `connector_moe`, each a [`MoEConfig`], a dict of its
    fields, or None for a dense part. A base of configuration classes, before the host's.
    """

    text_moe: Any
    vision_moe: Any
    connector_moe: Any

    def __post_init__(self, **kwargs):
        # The experts' fields are written on the LLM's configuration: the caller's dense one stays as it was.
        for name in self.sub_configs:
            setattr(self, name, deepcopy(getattr(self, name)))
        for name in ("auto_map", "body_model_type"):
            kwargs.pop(name, None)
        super().__post_init__(**kwargs)

    def resolve_parts(self) -> None:
        """Puts every part's settings in place, at the end of the construction.

        Raises:
            ValueError: naming the field, for settings that cannot be built.
        """
        for part in PARTS:
            self._resolve(part, getattr(self, f"{part}_moe"))
        self.auto_map = dict(AUTO_MAP)

    def __setattr__(self, name: str, value: Any) -> None:
        """Overriding a part of a loaded configuration with a dict changes the named fields and keeps the others."""
        part = name.removesuffix("_moe")
        if part in PARTS and isinstance(value, dict) and "auto_map" in self.__dict__:
            current = getattr(self, name)
            self._resolve(part, (current.to_dict() if current is not None else {}) | value, is_override=True)
        else:
            super().__setattr__(name, value)

    def moe(self, part: str) -> Any:
        """The experts' settings of a part ("text", "vision" or "connector"), or None where it is dense."""
        return getattr(self, f"{part}_moe")

    def check_experts(self) -> None:
        """Checks the parts again, after attributes may have been overridden on a sub-configuration.

        Raises:
            ValueError: naming the field.
        """
        for part in PARTS:
            if (moe := self.moe(part)) is not None:
                self._checked(part, moe.to_dict())

    def _checked(self, part: str, moe: dict[str, Any]) -> dict[str, Any]:
        """The settings of a part, checked, with its defaults and its explicit list of layers filled in."""
        moe = dict(moe)
        moe["num_experts"] = DEFAULT_NUM_EXPERTS[part] if moe["num_experts"] is None else moe["num_experts"]
        check_counts(part, moe)
        if part == "connector":
            if moe["layers"] is not None:
                raise ValueError(
                    f"connector_moe.layers is {moe['layers']}, but the connector is one MLP; leave `layers` out."
                )
            check_per_layer(part, moe)
            return moe
        if (tower_config := part_config(self, part)) is None:
            raise ValueError(f"{part}_moe is given, but the model has no {part} tower. Leave it out.")
        depth = num_layers(tower_config)
        useful = num_feature_layers(self) if part == "vision" else depth
        first = max(1, useful // 2) if part == "vision" else 0
        if moe["layers"] is None and first >= useful:
            raise ValueError(
                f"vision_moe has no layer to make sparse: {useful} of the vision tower's {depth} layers feed the "
                "selected feature "
                "layer, and the first one stays dense. Name `layers`, or select a later vision_feature_layer."
            )
        layers = range(first, useful) if moe["layers"] is None else moe["layers"]
        moe |= {"layers": check_layers(part, layers, depth, useful)}
        check_per_layer(part, moe)
        return moe

    def _resolve(self, part: str, given: Any, is_override: bool = False) -> None:
        """Puts a part's settings in place: checked, and for the LLM with the hosted fields on its configuration."""
        if given is None:
            return
        values = stated_fields(part, given)
        if part == "text":
            values = self._with_hosted(values, is_override)
        moe = self._checked(part, complete_fields(part, values))
        if part != "text":
            self.__dict__[f"{part}_moe"] = MoEConfig(**moe)
            return
        for name in HOSTED_FIELDS:
            if moe[name] is not None:
                setattr(part_config(self, "text"), name, moe[name])
        self.__dict__["text_moe"] = HostedMoEConfig(self, {k: v for k, v in moe.items() if k not in HOSTED_FIELDS})

    def _with_hosted(self, values: dict[str, Any], is_override: bool) -> dict[str, Any]:
        """The LLM's settings with what `text_config` already says; two unlike values of one field are an error."""
        text = part_config(self, "text")
        if text is self:
            raise ValueError(
                f"text_moe is given, but a {getattr(self, 'body_model_type', MODEL_TYPE)} model has no configuration "
                "of its own for its LLM, where the experts' settings live. Leave the LLM dense."
            )
        if declared := sparse_fields(text):
            raise ValueError(
                f"text_config is a {text.model_type} configuration, which is sparse already (it declares "
                f"{', '.join(declared)}); text_moe adds experts to dense LLMs only. `vlmoe import` makes a vlmoe "
                "model of a sparse LLM."
            )
        found = {name: value for name in HOSTED_FIELDS if (value := said_of(text, name)) is not None}
        if is_override:
            return found | values
        for name in found.keys() & values.keys():
            if values[name] is not None and values[name] != found[name]:
                raise ValueError(
                    f"text_moe.{name} is {values[name]!r}, but text_config.{name} is {found[name]!r}. For the LLM "
                    "text_config is "
                    "the one home of this field: give it once."
                )
        return values | found

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON values; `text_moe` without the fields that live on `text_config`."""
        output = super().to_dict()  # type: ignore[misc]
        for part in PARTS:
            moe = self.moe(part)
            written = None if moe is None else getattr(moe, "own_dict", moe.to_dict)()
            if written is not None and part == "connector":
                written.pop("layers")
            output[f"{part}_moe"] = written
        return output
