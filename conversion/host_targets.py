"""The native models of transformers that a host's VLM with sparse experts can be written as.

Its LLM is written by the pairs of `native_targets`, and by those of LLMs that exist inside a VLM alone. Around it
goes the VLM's sparse sibling, where transformers has one (`SIBLINGS`); else the VLM's own class, if that builds its
LLM from whatever its configuration holds. Which does is seen on the built model, not told by names.

Read in transformers 5.23: `models/{qwen3_vl,qwen3_vl_moe,qwen3_5,qwen3_5_moe}`.

    qwen3_vl                              -> qwen3_vl_moe
    qwen3_5                               -> qwen3_5_moe; a dense layer becomes equal experts
    llava_next, llava_onevision, internvl, mistral3, idefics3, smolvlm, ...
                                          -> itself around qwen3_moe, qwen2_moe or mixtral
"""

from dataclasses import dataclass, replace
from typing import Any

from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING

from modeling_vlmoe.configuration_in_place import BODY
from modeling_vlmoe.moe_config import HOSTED_FIELDS, PARTS, part_config
from modeling_vlmoe.parts import find_towers

from .meta_models import build_on_meta, in_float32
from .native_targets import PAIRS, QWEN2_MOE, QWEN3_MOE, Pair, choose_pair, declared_fields, to_native
from .parents import BROKEN

# Their routers always renormalise; neither has windows.
QWEN3_VL_MOE = replace(QWEN3_MOE, model_type="qwen3_vl_moe_text", has_norm_topk=False, no_effect={})
QWEN3_5_MOE = replace(
    QWEN2_MOE, model_type="qwen3_5_moe_text", has_dense_layers=False, has_norm_topk=False, no_effect={}
)
HOST_PAIRS = (
    *PAIRS,
    Pair("qwen3_vl_text", QWEN3_VL_MOE),
    Pair("qwen3_5_text", QWEN3_5_MOE, idle=("intermediate_size",)),
)
# VLMs with a sparse sibling that has a class of its own.
SIBLINGS = {"qwen3_vl": "qwen3_vl_moe", "qwen3_5": "qwen3_5_moe"}
# Sparse LLMs that look like a dense one's, and why they compute something else.
UNLIKE = {
    "glm4v_text": (
        "glm4v_moe_text has a sigmoid router and an ungated shared expert, and no norms behind attention and MLP"
    ),
    "exaone4": "exaone_moe has a sigmoid router, and its norms stand before attention and MLP, not behind them",
    "lfm2": "lfm2_moe has a sigmoid router",
}
# What the JSON values of a sparse configuration have, and the dense one's not.
OURS = (BODY, "model_type", "auto_map", "architectures", "transformers_version", *(f"{part}_moe" for part in PARTS))


@dataclass(frozen=True)
class TextPart:
    """Of a host's configuration what concerns its LLM, under the names of our composite's."""

    text_config: Any
    text_moe: Any
    tie_word_embeddings: bool


def is_tied(config: Any) -> bool:
    """Whether head and embedding are one, as the whole's configuration says; where it does not, as its LLM's says."""
    said = (getattr(one, "tie_word_embeddings", None) for one in (config, config.get_text_config()))
    return bool(next((one for one in said if one is not None), False))


def text_part(config: Any) -> TextPart:
    """What a host's configuration says of its LLM."""
    return TextPart(part_config(config, "text"), config.text_moe, is_tied(config))


def text_place(config: Any) -> str:
    """The attribute that holds the LLM's configuration.

    Raises:
        ValueError: if it is not the whole's own.
    """
    text = part_config(config, "text")
    found = [name for name in config.sub_configs if getattr(config, name, None) is text]
    if len(found) != 1:
        raise ValueError(
            f"The configuration of a {config.body_model_type} holds its LLM's in {found or 'none'} of its fields; "
            "expected exactly one, to be written anew. Use the checkpoint with vlmoe's own code."
        )
    return found[0]


def host_text_config(config: Any) -> tuple[Pair | None, PreTrainedConfig]:
    """The written LLM's configuration, and the pair it is written by; None for a dense LLM.

    Raises:
        ValueError: naming what cannot be written.
    """
    part = text_part(config)
    family = part.text_config.model_type
    if part.text_moe is None:
        return None, type(part.text_config).from_dict(part.text_config.to_dict())
    known = dict.fromkeys(pair.dense for pair in HOST_PAIRS)
    if family not in known:
        why = UNLIKE.get(family, "transformers has none whose layers and routers are known to compute the same")
        raise ValueError(
            f"The LLM of this {config.body_model_type}, a {family}, cannot be written as a sparse LM of transformers: "
            f"{why}. There is one for {', '.join(known)}. Use the checkpoint with vlmoe's own code."
        )
    pair = choose_pair(part, HOST_PAIRS)
    return pair, to_native(pair, part)


def dense_values(config: Any) -> dict[str, Any]:
    """The JSON values of the dense VLM's configuration, from that of the VLM that is sparse in place."""
    values = {name: value for name, value in config.to_dict().items() if name not in OURS}
    place = text_place(config)
    values[place] = {name: value for name, value in values[place].items() if name not in HOSTED_FIELDS}
    return values


def check_carried(dense: PreTrainedConfig, sparse: PreTrainedConfig) -> None:
    """Refuses fields that the sibling's configuration does not declare, where they are used.

    Raises:
        ValueError: naming them.
    """
    known, defaults = declared_fields(sparse), declared_fields(type(dense)())
    lost = [
        f"{name} is {value!r}"
        for name, value in declared_fields(dense).items()
        if name not in known and value != defaults.get(name)
    ]
    if lost:
        raise ValueError(
            f"This {dense.model_type} cannot be written without loss: {sparse.model_type} does not know "
            f"{', '.join(lost)}. Use the checkpoint with vlmoe's own code."
        )


def sibling_config(dense: Any, sparse_class: Any, place: str, text: PreTrainedConfig) -> PreTrainedConfig:
    """The sibling's configuration around the LLM's: every other field is the dense one's.

    Raises:
        ValueError: naming a field that it does not know.
    """
    defaults = sparse_class()
    values = {name: value for name, value in dense.to_dict().items() if name not in OURS}
    for name in dense.sub_configs:
        own = getattr(dense, name, None)
        if name == place:
            values[name] = text
        elif own is not None:
            check_carried(own, getattr(defaults, name))
            kept = {field: value for field, value in own.to_dict().items() if field not in OURS}
            values[name] = type(getattr(defaults, name))(**kept)
    check_carried(dense, defaults)
    return sparse_class(**values)


def host_config(config: Any) -> tuple[Pair | None, PreTrainedConfig]:
    """The written VLM's configuration, and the pair its LLM is written by.

    Args:
        config: of a VLM that is sparse in place.

    Raises:
        ValueError: naming what cannot be written.
    """
    pair, text = host_text_config(config)
    dense, place = config.dense_class.from_dict(dense_values(config)), text_place(config)
    sibling = CONFIG_MAPPING[SIBLINGS[dense.model_type]] if pair and dense.model_type in SIBLINGS else None
    if sibling is not None:
        native = sibling_config(dense, sibling, place, text)
    else:
        native = dense
        setattr(native, place, text)
    if hasattr(config, "tie_word_embeddings"):
        native.tie_word_embeddings = config.tie_word_embeddings
    native.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[native.model_type]]
    return pair, native


def build_native_host(native: Any) -> PreTrainedModel:
    """The written VLM on the meta device.

    Raises:
        ValueError: when its class does not build the LLM that its configuration holds.
    """
    text = part_config(native, "text")
    wanted: Any = MODEL_MAPPING[type(text)]
    try:
        model = build_on_meta(lambda: AutoModelForImageTextToText.from_config(in_float32(native)))
    except (*BROKEN, ImportError) as error:
        raise ValueError(
            f"A {native.model_type} cannot be built around a {text.model_type} LLM: {error}. Choose --to text, the LM "
            "alone, or use the checkpoint with vlmoe's own code."
        ) from error
    tower = find_towers(model)["text"][1]
    if type(tower) is not wanted:
        raise ValueError(
            f"A {native.model_type} builds its LLM by {type(tower).__name__}, whatever its configuration holds, so it "
            f"cannot carry a {text.model_type} ({wanted.__name__}). Choose --to text, the LM alone, or use the "
            "checkpoint with vlmoe's own code."
        )
    return model
