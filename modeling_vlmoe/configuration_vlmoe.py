"""Configuration of a sparse vision-language model: two towers, a connector, and which parts of them carry experts.

Invariant: for the LLM, the names that trainers and servers know (`HOSTED_FIELDS`) live on `text_config` and nowhere
else; `config.text_moe` reads and writes them through.

    >>> config = VLMoEConfig(text_config=llama_config, vision_config=siglip_config, text_moe={"num_experts": 8})
    >>> config.text_moe.layers, config.text_config.num_experts_per_tok
    ([0, 1, 2, 3], 2)
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

PARTS = ("text", "vision", "connector")
DEFAULT_NUM_EXPERTS = {"text": 8, "vision": 4, "connector": 4}
DEFAULT_EXPERT_RANK = 16
# Where TRL, vLLM and others look, and where TRL writes.
HOSTED_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "output_router_logits",
    "moe_intermediate_size",
    "num_shared_experts",
    "shared_expert_intermediate_size",
)
# A configuration class that declares one of these is sparse already.
SPARSE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")

# Fields of an LLM whose layers are given more than hidden states, made of token ids (Gemma-3n).
TOKEN_FIELDS = ("hidden_size_per_layer_input",)

_GENERATION = "modeling_vlmoe.VLMoEForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_vlmoe.VLMoEConfig",
    "AutoModel": "modeling_vlmoe.VLMoEModel",
    "AutoModelForImageTextToText": _GENERATION,
    "AutoModelForMultimodalLM": _GENERATION,
    "AutoModelForCausalLM": _GENERATION,
    "AutoModelForSequenceClassification": "modeling_vlmoe.VLMoEForSequenceClassification",
}


@strict
@dataclass(eq=False)
class MoEConfig:
    """The experts of one part: the LLM, the ViT or the connector.

    Attributes:
        num_experts: experts per sparse layer; None takes the part's default (LLM 8, ViT and connector 4).
        num_experts_per_tok: experts that each token is sent to (top-k).
        layers: indices of the sparse layers, counted from 0; None takes the part's default (LLM: all; ViT: of the n
            layers that feed the selected feature layer, those from max(1, n // 2) on). Not accepted for the connector.
        moe_intermediate_size: expert width; None takes the dense MLP's.
        norm_topk_prob: whether the chosen experts' weights are renormalised to sum to one ("renorm" of MATHS: copies
            of the dense MLP then compute exactly what it computes, whatever the router).
        num_shared_experts: experts that every token is sent to beside the routed ones: 0, or 1 as in Qwen2-MoE, whose
            output is weighted by the sigmoid of a linear gate of its own.
        shared_expert_intermediate_size: width of the shared expert; None takes the experts'.
        router_type: "softmax", the softmax over a linear layer on the token.
        expert_type: "full", every expert with weights of its own; or "delta", one base that all experts share and a
            pair of low rank per expert beside each of its weights (DeRS, 2503.01359).
        expert_rank: rank of the pairs of delta experts; None takes 16.
        train_expert_base: whether training changes the base of delta experts (DeRS loses 1.3 to 1.6 points without).
        router_aux_loss_coef: weight of the load-balancing loss (Switch Transformers, 2101.03961, eq. 4), per tower.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, 2202.08906, eq. 5), per tower.
        output_router_logits: whether outputs carry the router logits without being asked.
    """

    num_experts: int | None = None
    num_experts_per_tok: int = 2
    layers: list[int] | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    router_type: Literal["softmax"] = "softmax"
    expert_type: Literal["full", "delta"] = "full"
    expert_rank: int | None = None
    train_expert_base: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def __eq__(self, other: object) -> bool:
        return hasattr(other, "to_dict") and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


class HostedMoEConfig:
    """The LLM's `MoEConfig`, whose `HOSTED_FIELDS` are the text configuration's own attributes, read and written
    live.
    """

    def __init__(self, root: "VLMoEConfig", own: dict[str, Any]):
        self.__dict__.update(own, _root=root)

    def __getattr__(self, name: str) -> Any:
        if name in HOSTED_FIELDS:
            return getattr(self.__dict__["_root"].text_config, name, None)
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in HOSTED_FIELDS:
            setattr(self._root.text_config, name, value)
        else:
            self.__dict__[name] = value

    def to_dict(self) -> dict[str, Any]:
        """Every field, the hosted ones included."""
        return {field.name: getattr(self, field.name) for field in fields(MoEConfig)}

    def own_dict(self) -> dict[str, Any]:
        """The fields whose home is here, which is what `config.json` holds under `text_moe`."""
        return {name: value for name, value in self.to_dict().items() if name not in HOSTED_FIELDS}

    def __eq__(self, other: object) -> bool:
        return hasattr(other, "to_dict") and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"HostedMoEConfig({self.to_dict()})"


def sparse_fields(config: PreTrainedConfig) -> list[str]:
    """The fields by which a configuration class says that its own model is a sparse one; empty for a dense model."""
    return [name for name in SPARSE_FIELDS if hasattr(type(config), name) or name in type(config).attribute_map]


def merges_patches(vision_config: PreTrainedConfig) -> bool:
    """Whether the ViT joins neighbouring patches behind its last layer, as Qwen's do: that is what is read then."""
    return hasattr(vision_config, "spatial_merge_size") and hasattr(vision_config, "out_hidden_size")


def feature_width(vision_config: Any) -> int:
    """The width of what the connector reads of one hidden state."""
    return vision_config.out_hidden_size if merges_patches(vision_config) else vision_config.hidden_size


def feature_layers(config: "VLMoEConfig") -> list[int]:
    """The hidden states of the ViT that the connector reads."""
    chosen: Any = config.vision_feature_layer
    return [chosen] if isinstance(chosen, int) else list(chosen)


def num_feature_layers(config: "VLMoEConfig") -> int:
    """How many layers of the ViT feed the feature layer that the connector reads.

    Raises:
        ValueError: if `vision_feature_layer` is out of range, or not the last of a ViT that merges patches behind it.
    """
    depth = config.vision_config.num_hidden_layers
    chosen, indices = config.vision_feature_layer, feature_layers(config)
    if merges_patches(config.vision_config) and indices != [-1]:
        raise ValueError(
            f"vision_feature_layer is {chosen}, but a {config.vision_config.model_type} merges patches behind its "
            "last layer, and the connector reads what it gives then. Leave vision_feature_layer out."
        )
    if not indices or any(not -depth - 1 <= index <= depth for index in indices):
        raise ValueError(
            f"vision_feature_layer is {chosen}, but the vision tower has {depth} layers, so its hidden states are "
            f"{-depth - 1} to {depth} (0 is the embeddings, {depth} or -1 the last layer's output). "
            "Choose among these."
        )
    return max(index % (depth + 1) for index in indices)


def _check_reads_embeddings(text_config: Any) -> None:
    """Refuses an LLM whose layers want token ids, which the features of images have not.

    Raises:
        ValueError: naming the field.
    """
    for name in TOKEN_FIELDS:
        if value := getattr(text_config, name, None):
            raise ValueError(
                f"text_config.{name} is {value}: each layer of this {text_config.model_type} adds embeddings of its "
                "own, looked up by token id, and image features have no token id. Supported are LLMs whose layers "
                "read hidden states alone; choose another LLM."
            )


def _stated_fields(part: str, given: Any) -> dict[str, Any]:
    """What the user said about a part: a dict as it is, of a `MoEConfig` the fields that differ from their
    defaults.
    """
    if isinstance(given, dict):
        return dict(given)
    if not hasattr(given, "to_dict"):
        raise ValueError(
            f"{part}_moe is {given!r}; expected a MoEConfig, a dict of its fields, or None for a dense part."
        )
    values = given.to_dict()
    return {field.name: values[field.name] for field in fields(MoEConfig) if values[field.name] != field.default}


def _complete(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """All fields of a part, their names and types checked."""
    known = [field.name for field in fields(MoEConfig)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{part}_moe has unknown fields {unknown}; expected some of: {', '.join(known)}.")
    try:
        return MoEConfig(**values).to_dict()
    except StrictDataclassError as error:
        raise ValueError(f"{part}_moe: {error}") from error


def _check_counts(part: str, moe: dict[str, Any]) -> None:
    if moe["num_experts"] < 1:
        raise ValueError(f"{part}_moe.num_experts is {moe['num_experts']}; expected 1 or more.")
    if not 1 <= moe["num_experts_per_tok"] <= moe["num_experts"]:
        raise ValueError(
            f"{part}_moe.num_experts_per_tok is {moe['num_experts_per_tok']}, but there are {moe['num_experts']} "
            "experts; "
            f"expected 1 to {moe['num_experts']}."
        )
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if moe[name] is not None and moe[name] < 1:
            raise ValueError(f"{part}_moe.{name} is {moe[name]}; expected 1 or more.")
    if moe["num_shared_experts"] not in (0, 1):
        raise ValueError(
            f"{part}_moe.num_shared_experts is {moe['num_shared_experts']}; expected 0 or 1. Several shared experts "
            "are one of their summed width (shared_expert_intermediate_size)."
        )
    if moe["shared_expert_intermediate_size"] is not None and not moe["num_shared_experts"]:
        raise ValueError(
            f"{part}_moe.shared_expert_intermediate_size is {moe['shared_expert_intermediate_size']}, but there is no "
            "shared expert; set num_shared_experts to 1, or leave it out."
        )
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if moe[name] < 0:
            raise ValueError(f"{part}_moe.{name} is {moe[name]}; expected 0 or more.")
    _check_deltas(part, moe)


def _check_deltas(part: str, moe: dict[str, Any]) -> None:
    """Checks the fields of delta experts, and fills in their rank."""
    if moe["expert_type"] == "delta":
        moe["expert_rank"] = DEFAULT_EXPERT_RANK if moe["expert_rank"] is None else moe["expert_rank"]
        if moe["expert_rank"] < 1:
            raise ValueError(f"{part}_moe.expert_rank is {moe['expert_rank']}; expected 1 or more.")
        return
    for name, default in (("expert_rank", None), ("train_expert_base", True)):
        if moe[name] != default:
            raise ValueError(
                f"{part}_moe.{name} is {moe[name]}, but expert_type is {moe['expert_type']!r}, whose experts share no "
                'base; leave it out, or set expert_type to "delta".'
            )


def _check_layers(part: str, layers: Iterable[int], num_layers: int, num_useful: int) -> list[int]:
    """The layers in order, each of them in the tower and, for a ViT, of use to the connector."""
    chosen = sorted(layers)
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{part}_moe.layers names a layer twice: {chosen}. Name each once.")
    if not chosen:
        raise ValueError(
            f"{part}_moe.layers is empty; name at least one layer, or give {part}_moe=None for a dense part."
        )
    if unknown := [layer for layer in chosen if not 0 <= layer < num_layers]:
        raise ValueError(
            f"{part}_moe.layers asks for layers {unknown}, but the {part} tower has {num_layers} (0 to "
            f"{num_layers - 1}). "
            "Layers are counted from 0; name others."
        )
    if beyond := [layer for layer in chosen if layer >= num_useful]:
        raise ValueError(
            f"{part}_moe.layers asks for layers {beyond}, but the connector reads the output of layer "
            f"{num_useful - 1} "
            "(vision_feature_layer): experts beyond it would never get a gradient. "
            f"Choose from 0 to {num_useful - 1}, or select a later feature layer."
        )
    return chosen


@strict
class VLMoEConfig(PreTrainedConfig):
    r"""Configuration of [`VLMoEForConditionalGeneration`].

    Args:
        text_config: the dense LLM's configuration, of any registered family.
        vision_config: the dense ViT's configuration.
        text_moe: the LLM's experts: a [`MoEConfig`], a dict of its fields, or None for a dense LLM.
        vision_moe: the same for the ViT.
        connector_moe: the same for the connector.
        image_token_id: the placeholder that an image's features replace.
        vision_feature_layer: the hidden state of the ViT that the connector reads (-2: the last layer's input); a list
            is concatenated. None takes -2, or -1 where the ViT merges patches behind its last layer (Qwen2.5-VL): then
            the connector reads what it merged.
        vision_feature_select_strategy: "default" leaves out the tokens that precede the patches, "full" keeps every
            token; None takes "default" where the ViT has a class token or registers.
        vision_num_prefix_tokens: how many tokens "default" leaves out; None takes the ViT's own: its class token and
            its registers, or 1 where it has neither. LLaVA leaves out 1, whatever its ViT.
        connector_hidden_act: the connector's activation.
        connector_bias: whether the connector's Linears have biases.
        lm_head_bias: whether the head has a bias, as the dense LLM's does in some families (Phi, GPT-J).

    Raises:
        ValueError: naming the field, for settings that cannot be built.
    """

    model_type = "vlmoe"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model"),
    }
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "vision_router_logits",
        "connector_router_logits",
        "router_losses",
        "aux_loss",
        "image_hidden_states",
    ]

    text_config: Any = None
    vision_config: Any = None
    text_moe: Any = None
    vision_moe: Any = None
    connector_moe: Any = None
    image_token_id: int | None = None
    vision_feature_layer: int | list[int] | None = None
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    vision_num_prefix_tokens: int | None = None
    connector_hidden_act: str = "gelu"
    connector_bias: bool = True
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)
        for name in ("text_config", "vision_config"):
            if not isinstance(given := getattr(self, name), (dict, PreTrainedConfig, type(None))):
                raise ValueError(
                    f"{name} is {given!r}; expected a dense tower's configuration, or a dict of its fields."
                )
        # The experts' fields are written on text_config: the caller's dense configuration stays as it was.
        self.text_config, self.vision_config = deepcopy(self.text_config), deepcopy(self.vision_config)
        super().__post_init__(**kwargs)
        _check_reads_embeddings(self.text_config)
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if self.vision_feature_layer is None:
            self.vision_feature_layer = -1 if merges_patches(self.vision_config) else -2
        if (left_out := self.vision_num_prefix_tokens) is not None and left_out < 0:
            raise ValueError(f"vision_num_prefix_tokens is {left_out}; expected 0 or more.")
        num_feature_layers(self)
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
        _check_counts(part, moe)
        if part == "connector":
            if moe["layers"] is not None:
                raise ValueError(
                    f"connector_moe.layers is {moe['layers']}, but the connector is one MLP; leave `layers` out."
                )
            return moe
        tower_config = self.text_config if part == "text" else self.vision_config
        depth = tower_config.num_hidden_layers
        useful = num_feature_layers(self) if part == "vision" else depth
        first = max(1, useful // 2) if part == "vision" else 0
        if moe["layers"] is None and first >= useful:
            raise ValueError(
                f"vision_moe has no layer to make sparse: {useful} of the vision tower's {depth} layers feed the "
                "selected feature "
                "layer, and the first one stays dense. Name `layers`, or select a later vision_feature_layer."
            )
        layers = range(first, useful) if moe["layers"] is None else moe["layers"]
        return moe | {"layers": _check_layers(part, layers, depth, useful)}

    def _resolve(self, part: str, given: Any, is_override: bool = False) -> None:
        """Puts a part's settings in place: checked, and for the LLM with the hosted fields on `text_config`."""
        if given is None:
            return
        values = _stated_fields(part, given)
        if part == "text":
            values = self._with_hosted(values, is_override)
        moe = self._checked(part, _complete(part, values))
        if part != "text":
            self.__dict__[f"{part}_moe"] = MoEConfig(**moe)
            return
        for name in HOSTED_FIELDS:
            if moe[name] is not None:
                setattr(self.text_config, name, moe[name])
        self.__dict__["text_moe"] = HostedMoEConfig(self, {k: v for k, v in moe.items() if k not in HOSTED_FIELDS})

    def _with_hosted(self, values: dict[str, Any], is_override: bool) -> dict[str, Any]:
        """The LLM's settings with what `text_config` already says; two unlike values of one field are an error."""
        if declared := sparse_fields(self.text_config):
            raise ValueError(
                f"text_config is a {self.text_config.model_type} configuration, which is sparse already (it declares "
                f"{', '.join(declared)}); text_moe adds experts to dense LLMs only. `vlmoe import` makes a vlmoe "
                "model of a sparse LLM."
            )
        found = {name: value for name in HOSTED_FIELDS if (value := getattr(self.text_config, name, None)) is not None}
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
        output = super().to_dict()
        for part in PARTS:
            moe = self.moe(part)
            written = None if moe is None else getattr(moe, "own_dict", moe.to_dict)()
            if written is not None and part == "connector":
                written.pop("layers")
            output[f"{part}_moe"] = written
        return output


__all__ = ["MoEConfig", "VLMoEConfig"]
