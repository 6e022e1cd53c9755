"""The sparse LMs of transformers that a vlmoe model's LLM can be written as, or made of: a table.

A `Pair` says of one dense family and one sparse family how the same numbers are configured in both. Every field that
the dense configuration class declares is carried by its name, or handled by its pair, or an obstacle; a field that a
later transformers adds is an obstacle as soon as it is used. What a pair cannot carry is named by `obstacles`.

Read in transformers 5.23: `models/{llama,mistral,qwen2,qwen3,mixtral,qwen2_moe,qwen3_moe}`.

    qwen3            -> qwen3_moe
    qwen2            -> qwen2_moe
    llama            -> mixtral where every layer is sparse, else qwen2_moe
    mistral          -> mixtral; a dense layer becomes equal experts
"""

import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from modeling_vlmoe.moe_config import HOSTED_FIELDS
from modeling_vlmoe.text_head import head_maths

# Width of a shared expert of zeros, where the target has one and the model has none: what kernels and splits over
# eight processes take; llama.cpp reads 0 as "not given".
IDLE_SHARED_WIDTH = 64
BASE_FIELDS = frozenset(one.name for one in fields(PreTrainedConfig))


@dataclass(frozen=True)
class SparseFamily:
    """How a sparse family of the host says what ours says.

    Attributes:
        model_type: The host's.
        num_experts: Its name for the number of experts.
        expert_width: Its name for the experts' width.
        router: Its name for the router's weight, in the block.
        expert: Its stored names for an expert's gate, up and down projection, in the block.
        block: The stored name of the block in its layer.
        has_dense_layers: Whether some layers may be dense (`mlp_only_layers`).
        has_norm_topk: Whether `norm_topk_prob` is a choice; else the weights are always renormalised.
        has_shared_expert: Whether every block has a shared expert.
        no_effect: Its own fields that must have these values, since ours has no such thing.
    """

    model_type: str
    num_experts: str
    expert_width: str
    router: str
    expert: tuple[str, str, str]
    block: str
    has_dense_layers: bool
    has_norm_topk: bool
    has_shared_expert: bool
    no_effect: dict[str, Any] = field(default_factory=dict)


QWEN_EXPERT = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
MIXTRAL = SparseFamily(
    model_type="mixtral",
    num_experts="num_local_experts",
    expert_width="intermediate_size",
    router="gate.weight",
    expert=("w1.weight", "w3.weight", "w2.weight"),
    block="block_sparse_moe",
    has_dense_layers=False,
    has_norm_topk=False,
    has_shared_expert=False,
    no_effect={"router_jitter_noise": 0.0},
)
QWEN2_MOE = SparseFamily(
    model_type="qwen2_moe",
    num_experts="num_experts",
    expert_width="moe_intermediate_size",
    router="gate.weight",
    expert=QWEN_EXPERT,
    block="mlp",
    has_dense_layers=True,
    has_norm_topk=True,
    has_shared_expert=True,
    no_effect={"use_sliding_window": False},
)
QWEN3_MOE = replace(QWEN2_MOE, model_type="qwen3_moe", has_shared_expert=False)


@dataclass(frozen=True)
class Pair:
    """A dense family whose layers are, attention and norms, those of a sparse family.

    Attributes:
        dense: The dense family's `model_type`.
        sparse: The sparse family.
        implied: Fields of the sparse configuration that this pair means.
        needed: Fields of the dense configuration that must have these values, as the sparse one has no such choice.
        idle: Fields of the dense configuration that change nothing.
        has_windows: Whether sliding-window attention means the same in both; else every layer must see everything.
        has_head_dim: Whether the sparse family takes a width of heads that is not hidden_size / heads.
    """

    dense: str
    sparse: SparseFamily
    implied: dict[str, Any] = field(default_factory=dict)
    needed: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    has_windows: bool = False
    has_head_dim: bool = True


WINDOW_FIELDS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
# In the order of preference: an export takes the first without obstacles, an import the first that is meant.
PAIRS = (
    Pair("qwen3", QWEN3_MOE, idle=WINDOW_FIELDS),
    Pair("qwen2", QWEN2_MOE, implied={"qkv_bias": True}, idle=WINDOW_FIELDS, has_head_dim=False),
    Pair("mistral", MIXTRAL, has_windows=True),
    Pair("llama", MIXTRAL, implied={"sliding_window": None}, needed=NO_BIASES, idle=("pretraining_tp",)),
    Pair("llama", QWEN2_MOE, {"qkv_bias": False}, needed=NO_BIASES, idle=("pretraining_tp",), has_head_dim=False),
)
DENSE_FAMILIES = tuple(dict.fromkeys(pair.dense for pair in PAIRS))
SPARSE_FAMILIES = tuple(dict.fromkeys(pair.sparse.model_type for pair in PAIRS))


def declared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a configuration's own class declares, with their values; what every class has is left out."""
    names = [one.name for one in fields(type(config)) if one.name not in BASE_FIELDS]
    return {name: getattr(config, name) for name in (*names, "tie_word_embeddings") if hasattr(config, name)}


def window_layers(config: PreTrainedConfig) -> list[int]:
    """The layers that see a sliding window only."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [index for index, one in enumerate(types) if one == "sliding_attention"]
    is_used = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return list(range(config.num_hidden_layers)) if is_used else []


def plain_head_dim(config: PreTrainedConfig) -> int:
    """The width of a head where no configuration says another."""
    return config.hidden_size // config.num_attention_heads


def dense_layers(config: Any) -> list[int]:
    """The layers of a vlmoe model's LLM that are dense."""
    sparse = set(config.text_moe.layers)
    return [index for index in range(config.text_config.num_hidden_layers) if index not in sparse]


def attention_obstacles(pair: Pair, text: PreTrainedConfig) -> list[str]:
    """What of the dense layers the sparse family lacks."""
    found = [
        f"{name} is {value!r} ({wanted!r} is all it has)"
        for name, wanted in pair.needed.items()
        if (value := getattr(text, name, wanted)) != wanted
    ]
    head_dim = getattr(text, "head_dim", None) or plain_head_dim(text)
    if not pair.has_head_dim and head_dim != plain_head_dim(text):
        found.append(f"head_dim is {head_dim} (hidden_size / num_attention_heads, {plain_head_dim(text)}, is all)")
    if not pair.has_windows and (layers := window_layers(text)):
        found.append(f"sliding-window attention of {text.sliding_window} tokens in layers {layers}")
    found += [f"{name} is {value!r} (maths of the head)" for name, (_, value) in head_maths(text).items()]
    carried = {one.name for one in fields(type(AutoConfig.for_model(pair.sparse.model_type)))}
    handled = {*carried, *pair.needed, *pair.idle, "head_dim", *HOSTED_FIELDS}
    defaults = type(text)()
    found += [
        f"{name} is {value!r}, which it does not know"
        for name, value in declared_fields(text).items()
        if name not in handled and value != getattr(defaults, name, None)
    ]
    return found


# Fields of a `MoEConfig` that change what is computed, and the values by which these families compute.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "router_type": ("softmax",),
    "routed_scaling_factor": (1.0,),
    "use_expert_bias": (False,),
    "router_logit_norm": (None,),
    "modality_routing": ("shared", "per_modality_balance"),  # the latter is a loss
    "expert_type": ("full",),
}


def expert_obstacles(pair: Pair, config: Any) -> list[str]:
    """What of the routers and experts the sparse family lacks; a dense layer may become equal experts."""
    moe, sparse, found = config.text_moe, pair.sparse, []
    for name, known in COMPUTED.items():
        if (value := getattr(moe, name)) not in known:
            found.append(f"{name} is {value!r} ({known[0]!r} is all it has)")
    if not moe.norm_topk_prob and not sparse.has_norm_topk:
        found.append("norm_topk_prob is False (its weights are always renormalised)")
    if moe.num_shared_experts and not sparse.has_shared_expert:
        found.append("a shared expert in every sparse layer")
    layers, width = dense_layers(config), config.text_config.intermediate_size
    if layers and not sparse.has_dense_layers and width != moe.moe_intermediate_size:
        found.append(f"dense layers {layers} of width {width}, and experts of width {moe.moe_intermediate_size}")
    return found


def choose_pair(config: Any, pairs: tuple[Pair, ...] = PAIRS) -> Pair:
    """The first pair that carries a vlmoe model's sparse LLM; one that keeps dense layers dense goes before.

    Args:
        config: the model's.
        pairs: what it may be written by.

    Raises:
        ValueError: naming every candidate and what it lacks.
    """
    family = config.text_config.model_type
    fitting = [pair for pair in pairs if pair.dense == family]
    if not fitting:
        raise ValueError(
            f"The LLM is a {family} model, and transformers has no sparse LM with its layers that could be written; "
            f"there is one for {', '.join(DENSE_FAMILIES)}. Use the checkpoint with vlmoe's own code."
        )
    lacking = [
        (pair, attention_obstacles(pair, config.text_config) + expert_obstacles(pair, config)) for pair in fitting
    ]
    free = [pair for pair, obstacles in lacking if not obstacles]
    if not free:
        reasons = "; ".join(f"{pair.sparse.model_type} lacks: {', '.join(found)}" for pair, found in lacking)
        raise ValueError(
            f"This {family} LLM cannot be written without loss as a sparse LM of transformers. {reasons}. Serve the "
            "checkpoint with vlmoe's own code, or train from parents without that."
        )
    keeps_dense = [pair for pair in free if pair.sparse.has_dense_layers or not dense_layers(config)]
    return (keeps_dense or free)[0]


def to_native(pair: Pair, config: Any) -> PreTrainedConfig:
    """The sparse configuration that means the same as a vlmoe model's LLM."""
    text, moe, sparse = config.text_config, config.text_moe, pair.sparse
    known = {one.name for one in fields(type(AutoConfig.for_model(sparse.model_type)))}
    dense = {name: value for name, value in declared_fields(text).items() if name not in (*pair.idle, *HOSTED_FIELDS)}
    values: dict[str, Any] = {name: value for name, value in dense.items() if name in known}
    values |= {name: value for name, value in sparse.no_effect.items() if name in known}
    values |= pair.implied | {
        "tie_word_embeddings": config.tie_word_embeddings,
        "output_router_logits": moe.output_router_logits,
        # The host's balance loss is k at uniform routing, ours is 1.
        "router_aux_loss_coef": moe.router_aux_loss_coef / moe.num_experts_per_tok,
        "num_experts_per_tok": moe.num_experts_per_tok,
        sparse.num_experts: moe.num_experts,
        sparse.expert_width: moe.moe_intermediate_size,
    }
    if pair.has_head_dim and (head_dim := getattr(text, "head_dim", None)):
        values["head_dim"] = head_dim
    if sparse.has_norm_topk:
        values["norm_topk_prob"] = moe.norm_topk_prob
    if sparse.has_dense_layers:
        values["mlp_only_layers"] = dense_layers(config)
        values["decoder_sparse_step"] = 1
    if sparse.has_shared_expert:
        values["shared_expert_intermediate_size"] = moe.shared_expert_intermediate_size or IDLE_SHARED_WIDTH
    values = {name: copy.deepcopy(value) for name, value in values.items()}
    return AutoConfig.for_model(sparse.model_type, **values)


def is_native_sparse(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a sparse LM in the table."""
    return config.model_type in SPARSE_FAMILIES


def pair_of(config: PreTrainedConfig, candidates: tuple[Pair, ...] = PAIRS) -> Pair:
    """The pair, of some, that a native sparse LM means.

    Raises:
        ValueError: naming what ours lacks.
    """
    pairs = [pair for pair in candidates if pair.sparse.model_type == config.model_type]
    if not pairs:
        raise ValueError(
            f"A {config.model_type} model cannot be imported; expected one of {', '.join(SPARSE_FAMILIES)}. A dense "
            "LLM is made sparse by `vlmoe upcycle`."
        )
    meant = [pair for pair in pairs if all(getattr(config, name) == value for name, value in pair.implied.items())]
    pair = meant[0]
    found = [
        f"{name} is {value!r} (expected {wanted!r})"
        for name, wanted in pair.sparse.no_effect.items()
        if (value := getattr(config, name)) != wanted
    ]
    if not pair.has_windows and not found and (layers := window_layers(config)):
        found.append(f"sliding-window attention in layers {layers}")
    if not sparse_layers(pair, config):
        found.append("no layer is sparse")
    if found:
        raise ValueError(
            f"This {config.model_type} model cannot be imported without loss: {', '.join(found)}. Give another."
        )
    return pair


def sparse_layers(pair: Pair, config: Any) -> list[int]:
    """The layers of a native sparse LM that have experts, as its class reads them."""
    everything = range(config.num_hidden_layers)
    if not pair.sparse.has_dense_layers:
        return list(everything)
    dense = set(config.mlp_only_layers or ())
    return [index for index in everything if index not in dense and (index + 1) % config.decoder_sparse_step == 0]


def from_native(
    config: PreTrainedConfig, candidates: tuple[Pair, ...] = PAIRS
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The dense configuration and the experts' settings that mean the same as a native sparse LM.

    Args:
        config: its configuration.
        candidates: the pairs that it may mean.

    Returns:
        A `text_config` and a `text_moe` for `VLMoEConfig`.

    Raises:
        ValueError: naming what ours lacks.
    """
    pair = pair_of(config, candidates)
    sparse, native = pair.sparse, declared_fields(config)
    known = {one.name for one in fields(type(AutoConfig.for_model(pair.dense)))}
    hosted = {*HOSTED_FIELDS, *pair.idle}
    values = {name: value for name, value in native.items() if name in known and name not in hosted}
    values |= pair.needed
    if head_dim := getattr(config, "head_dim", None):
        values["head_dim"] = head_dim
    top_k = config.num_experts_per_tok
    moe: dict[str, Any] = {
        "num_experts": getattr(config, sparse.num_experts),
        "num_experts_per_tok": top_k,
        "layers": sparse_layers(pair, config),
        "moe_intermediate_size": getattr(config, sparse.expert_width),
        "norm_topk_prob": config.norm_topk_prob if sparse.has_norm_topk else True,
        "router_aux_loss_coef": config.router_aux_loss_coef * top_k,  # see `to_native`
        "output_router_logits": config.output_router_logits,
    }
    if sparse.has_shared_expert:
        moe["num_shared_experts"] = 1
        moe["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    values = {name: copy.deepcopy(value) for name, value in values.items()}
    return AutoConfig.for_model(pair.dense, **values), moe
