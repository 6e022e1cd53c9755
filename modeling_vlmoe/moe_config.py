"""The experts of one part of a vision-language model: their settings, where these live, and what may not be said.

Invariant: for the LLM, the names that trainers and servers know (`HOSTED_FIELDS`) live on its own configuration and
nowhere else; `config.text_moe` reads and writes them through.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .router_config import check_routing

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
# Fields of an LLM whose layers are given more than hidden states, made of token ids (Gemma-3n).
TOKEN_FIELDS = ("hidden_size_per_layer_input",)
# Where a class has one of these, it says whether the model is sparse.
SPARSE_SWITCHES = ("enable_moe_block", "is_moe")
# A configuration class that declares one of these is sparse already.
SPARSE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_intermediate_size")


@strict
@dataclass(eq=False)
class MoEConfig:
    """The experts of one part: the LLM, the ViT or the connector.

    Attributes:
        num_experts: experts per sparse layer; None takes the part's default (LLM 8, ViT and connector 4). For the ViT
            a list may give each sparse layer its own number.
        num_experts_per_tok: experts that each token is sent to (top-k).
        layers: indices of the sparse layers, counted from 0; None takes the part's default (LLM: all; ViT: of the n
            layers that feed the selected feature layer, those from max(1, n // 2) on). Not accepted for the connector.
        moe_intermediate_size: expert width; None takes the dense MLP's.
        norm_topk_prob: whether the chosen experts' weights are renormalised to sum to one ("renorm" of MATHS: copies
            of the dense MLP then compute exactly what it computes, whatever the router).
        num_shared_experts: experts that every token is sent to beside the routed ones: 0, or 1 as in Qwen2-MoE, whose
            output is weighted by the sigmoid of a linear gate of its own.
        shared_expert_intermediate_size: width of the shared expert; None takes the experts'.
        router_type: "softmax" of a linear layer on the token; "sigmoid" of it (DeepSeek-V3, 2412.19437); for ViT and
            connector "expert_choice", where experts choose tokens by the softmax (see expert_choice.py), and
            "attention": the softmax, of logits to which a gate adds that attends to the text that belongs to the image
            (see text_gate.py).
        router_text_size: width of that gate's queries, keys and values; None takes 64.
        routed_scaling_factor: what the routing weights are multiplied by; a list has one for each sparse layer.
            Without renormalisation, copies of the dense MLP compute s times what it computes: `vlmoe upcycle` measures
            1 / s.
        use_expert_bias: whether each expert has a bias that is added to its score when experts are chosen, not to its
            weight, and that training raises while the expert gets few tokens (2408.15664).
        expert_bias_update_rate: what a bias is raised or lowered by after an optimizer step.
        router_logit_norm: the standard deviation that a token's logits are normalised to (Skywork-MoE, 2406.06563);
            None leaves them as they are.
        modality_routing: for the LLM, what is open to image tokens and to text tokens (see modality_routing.py).
        modality_experts: of "intra_inter" and "isolated", how many experts are of images, of text and of both; None
            takes a quarter, a quarter and the rest, or halves.
        expert_type: "full", every expert with weights of its own; or "delta", one base that all experts share and a
            pair of low rank per expert beside each of its weights (DeRS, 2503.01359).
        expert_rank: rank of the pairs of delta experts; None takes 16.
        train_expert_base: whether training changes the base of delta experts (DeRS loses 1.3 to 1.6 points without).
        router_aux_loss_coef: weight of the load-balancing loss (Switch Transformers, 2101.03961, eq. 4), per tower.
        router_z_loss_coef: weight of the router z-loss (ST-MoE, 2202.08906, eq. 5), per tower.
        output_router_logits: whether outputs carry the router logits without being asked.
    """

    num_experts: int | list[int] | None = None
    num_experts_per_tok: int = 2
    layers: list[int] | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    num_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    router_type: Literal["softmax", "sigmoid", "expert_choice", "attention"] = "softmax"
    router_text_size: int | None = None
    routed_scaling_factor: float | list[float] = 1.0
    use_expert_bias: bool = False
    expert_bias_update_rate: float = 0.001
    router_logit_norm: float | None = None
    modality_routing: Literal["shared", "per_modality_balance", "intra_inter", "isolated"] = "shared"
    modality_experts: list[int] | None = None
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

    def __init__(self, root: Any, own: dict[str, Any]):
        self.__dict__.update(own, _root=root)

    def __getattr__(self, name: str) -> Any:
        if name in HOSTED_FIELDS:
            return getattr(part_config(self.__dict__["_root"], "text"), name, None)
        raise AttributeError(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in HOSTED_FIELDS:
            setattr(part_config(self._root, "text"), name, value)
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


def experts_in(moe: Any, position: int) -> int:
    """How many experts the how-manyth sparse layer of a part has."""
    number = moe.num_experts
    return number[position] if isinstance(number, list) else number


def fewest_experts(moe: Any) -> int:
    """The least that a sparse layer of a part has."""
    return min(moe.num_experts) if isinstance(moe.num_experts, list) else moe.num_experts


def part_config(config: Any, part: str) -> Any:
    """The configuration of a tower, "text" or "vision", in a vision-language model's; None where there is none."""
    return config.get_text_config() if part == "text" else getattr(config, "vision_config", None)


def sparse_fields(config: PreTrainedConfig) -> list[str]:
    """The fields by which a configuration class says that its own model is a sparse one; empty for a dense model, also
    for one of a class that could be sparse and is told not to be (Gemma-4, Doge).
    """
    if any(getattr(config, switch, None) is False for switch in SPARSE_SWITCHES):
        return []
    return [name for name in SPARSE_FIELDS if hasattr(type(config), name) or name in type(config).attribute_map]


def said_of(config: Any, name: str) -> Any:
    """What an LLM's configuration says of its experts; the default of a class that could be sparse says nothing."""
    value = getattr(config, name, None)
    return None if value == getattr(type(config), name, None) else value


def check_reads_embeddings(text_config: Any) -> None:
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


def stated_fields(part: str, given: Any) -> dict[str, Any]:
    """What the user said about a part: a dict as it is, of a `MoEConfig` the fields that differ from their
    defaults.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, dict):
        return dict(given)
    if not hasattr(given, "to_dict"):
        raise ValueError(
            f"{part}_moe is {given!r}; expected a MoEConfig, a dict of its fields, or None for a dense part."
        )
    values = given.to_dict()
    return {field.name: values[field.name] for field in fields(MoEConfig) if values[field.name] != field.default}


def _as_typed(name: str, value: Any) -> Any:
    """A whole number that stands for a fraction, as recipes write 1 for 1.0, as a fraction."""
    if "float" not in str(MoEConfig.__annotations__[name]):
        return value
    if isinstance(value, list):
        return [_as_typed(name, one) for one in value]
    return float(value) if type(value) is int else value


def complete_fields(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """All fields of a part, their names and types checked.

    Raises:
        ValueError: naming the field.
    """
    known = [field.name for field in fields(MoEConfig)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{part}_moe has unknown fields {unknown}; expected some of: {', '.join(known)}.")
    try:
        return MoEConfig(**{name: _as_typed(name, value) for name, value in values.items()}).to_dict()
    except StrictDataclassError as error:
        said = str(error.__cause__ or error).partition(" Errors:")[0].rstrip(".")
        raise ValueError(f"{part}_moe: {said}. Give a value of that type, or leave the field out.") from error


def check_counts(part: str, moe: dict[str, Any]) -> None:
    """Refuses numbers that cannot be built.

    Raises:
        ValueError: naming the field.
    """
    numbers = moe["num_experts"] if isinstance(moe["num_experts"], list) else [moe["num_experts"]]
    if isinstance(moe["num_experts"], list) and part != "vision":
        raise ValueError(
            f"{part}_moe.num_experts is {moe['num_experts']}; only sparse layers of a ViT may differ in it. Give "
            "one number."
        )
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{part}_moe.num_experts is {moe['num_experts']}; expected 1 or more.")
    if not 1 <= moe["num_experts_per_tok"] <= min(numbers):
        raise ValueError(
            f"{part}_moe.num_experts_per_tok is {moe['num_experts_per_tok']}, but there are {min(numbers)} experts; "
            f"expected 1 to {min(numbers)}."
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
    check_routing(part, moe)


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


def check_layers(part: str, layers: Iterable[int], num_layers: int, num_useful: int) -> list[int]:
    """The layers in order, each of them in the tower and, for a ViT, of use to the connector.

    Raises:
        ValueError: naming the layers.
    """
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
