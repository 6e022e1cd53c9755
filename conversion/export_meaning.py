"""Does the written configuration mean what the checkpoint's means? Every field is compared, since a run of some dozen
tokens does not see a window of thousands, or how positions are scaled far out.
"""

from typing import Any

from transformers import PreTrainedConfig

from modeling_vlmoe.moe_config import HOSTED_FIELDS

from .export_plan import ExportPlan
from .gaps import ProofError
from .llava_parents import vlmoe_fields
from .native_targets import Pair, declared_fields, from_native, plain_head_dim, window_layers

# Compared by their own fields; and what `check_features` has compared where it matters.
APART = {"text_config", "vision_config", "vision_num_prefix_tokens"}
MOE_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_shared_experts",
    "shared_expert_intermediate_size",
)


def text_meaning(text: PreTrainedConfig) -> dict[str, Any]:
    """What a dense LLM's configuration says, the same thing in the same way."""
    said = {name: value for name, value in declared_fields(text).items() if name not in HOSTED_FIELDS}
    said |= {"head_dim": getattr(text, "head_dim", None) or plain_head_dim(text), "windows": window_layers(text)}
    for name in ("use_sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings"):
        said.pop(name, None)  # in "windows"; the tie is the root's
    return said if said["windows"] else {name: value for name, value in said.items() if name != "sliding_window"}


def carried_meaning(pair: Pair | None, text: PreTrainedConfig) -> dict[str, Any]:
    """What a dense LLM's configuration says that the sparse one of a pair has to say too; all of it without a pair.

    The dense MLPs' width is not among it where the sparse family has none: Mixtral's `intermediate_size` is that of
    the experts, which is compared as such.
    """
    idle = () if pair is None else (*pair.idle, pair.sparse.expert_width)
    return {name: value for name, value in text_meaning(text).items() if name not in idle}


def check_experts(plan: ExportPlan, moe: dict[str, Any]) -> None:
    """Compares the experts' settings with those that a written LM means.

    Raises:
        ProofError: naming the field that differs.
    """
    wanted = {name: getattr(plan.config.text_moe, name) for name in MOE_FIELDS}
    if plan.equal_layers:
        wanted["layers"] = sorted([*wanted["layers"], *plan.equal_layers])
    if not plan.config.text_moe.num_shared_experts:  # one of zeros may stand there
        wanted = {name: value for name, value in wanted.items() if "shared" not in name}
    compare("LLM's experts", wanted, moe)


def compare(what: str, wanted: dict[str, Any], written: dict[str, Any]) -> None:
    """Compares the fields that both have.

    Raises:
        ProofError: naming the first that differs.
    """
    for name in wanted.keys() & written.keys():
        if wanted[name] != written[name]:
            raise ProofError(
                f"The configuration that was written says {name} {written[name]!r} of the {what}, but the checkpoint "
                f"says {wanted[name]!r}. No checkpoint is written."
            )


def check_meaning(plan: ExportPlan, written: PreTrainedConfig) -> None:
    """Compares a written configuration, read back, with the checkpoint's.

    Args:
        plan: What was to be written.
        written: What was.

    Raises:
        ProofError: naming the field that differs.
    """
    config: Any = plan.config
    native = getattr(written, "text_config", written)
    dense, moe = (native, None) if plan.pair is None else from_native(native)
    compare("LLM", carried_meaning(plan.pair, config.text_config), text_meaning(dense))
    compare("whole", {"tie": config.tie_word_embeddings}, {"tie": written.tie_word_embeddings})
    if moe is not None:
        check_experts(plan, moe)
    if native is not written:
        fields = vlmoe_fields(written, dense)
        compare("whole", {name: getattr(config, name) for name in fields if name not in APART}, fields)
        vision: Any = written
        compare("ViT", declared_fields(config.vision_config), declared_fields(vision.vision_config))
