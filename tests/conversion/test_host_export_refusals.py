"""A host's VLM that has no native form is refused with the exact reason, and with what can be had instead."""

import pytest
from transformers import Qwen2MoeConfig

from modeling_vlmoe.conversion import ExportArguments, ImportArguments, export, import_native
from modeling_vlmoe.conversion.host_targets import build_native_host
from tests import hosts
from tests.conversion.sparse_checkpoints import EXPERTS, save_hosted


def exported(checkpoint, out, **settings):
    return export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(out), **settings))


@pytest.mark.parametrize("to", ["native", "text"])
@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen2_vl", {}, "LLM of this qwen2_vl, a qwen2_vl_text, .* has none whose layers and routers"),
        ("qwen2_5_vl", {}, "LLM of this qwen2_5_vl, a qwen2_5_vl_text, .* has none whose layers and routers"),
        ("gemma3", {}, "LLM of this gemma3, a gemma3_text, cannot be written"),
        ("paligemma", {}, "LLM of this paligemma, a gemma, cannot be written"),
        (
            "qwen3_vl",
            {"moe": {"norm_topk_prob": False}},
            "qwen3_vl_moe_text lacks: norm_topk_prob is False .its weights are always renormalised",
        ),
        ("qwen3_vl", {"moe": {"num_shared_experts": 1}}, "qwen3_vl_moe_text lacks: a shared expert in every sparse"),
        (
            "qwen3_5",
            {"layers": [0], "moe": {"moe_intermediate_size": 16}},
            r"qwen3_5_moe_text lacks: dense layers \[1, 2\] of width 48, and experts of width 16",
        ),
        ("llava_next", {"moe": {"norm_topk_prob": False}}, "mixtral lacks: norm_topk_prob is False"),
    ],
    ids=str,
)
def test_raises_when_the_llm_has_no_sparse_sibling(tmp_path, family, settings, message, to, leaves_nothing):
    checkpoint = save_hosted(tmp_path / "sparse", family, **settings)
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        exported(checkpoint, tmp_path / "out", to=to)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vision_moe": EXPERTS}, r"layers \[2, 3\] of the ViT \(4 experts, top-2\) are no longer copies"),
        ({"connector_moe": EXPERTS}, r"the connector \(4 experts, top-2\) are no longer copies"),
        (
            {"vision_moe": EXPERTS | {"norm_topk_prob": False}, "connector_moe": EXPERTS},
            r"of the ViT .* and have weights that do not sum to one .*; those of the connector",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("mean_experts", [False, True])
def test_raises_when_experts_of_image_parts_are_unlike(tmp_path, fields, named, mean_experts, leaves_nothing):
    checkpoint = save_hosted(tmp_path / "sparse", "qwen3_vl", **fields)
    with leaves_nothing(), pytest.raises(ValueError, match=f"{named}.*cannot be exported without loss"):
        exported(checkpoint, tmp_path / "out", mean_experts=mean_experts)


def test_unlike_experts_of_image_parts_are_no_matter_for_the_lm_alone(tmp_path):
    checkpoint = save_hosted(tmp_path / "sparse", "internvl", vision_moe=EXPERTS, connector_moe=EXPERTS)
    assert exported(checkpoint, tmp_path / "out", to="text").is_dir()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "qwen3_vl",
            {"to": "llava"},
            "--to llava is given, but .* is a qwen3_vl that is sparse in place, and no LLaVA",
        ),
        ("qwen3_vl", {"to": "text"}, "no causal LM for the qwen3_vl_moe_text of this qwen3_vl.*Choose --to native"),
        ("qwen3_vl", {"mean_experts": True}, "the export is exact"),
    ],
    ids=str,
)
def test_raises_when_another_form_is_asked_for(tmp_path, family, settings, message, leaves_nothing):
    checkpoint = save_hosted(tmp_path / "sparse", family)
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        exported(checkpoint, tmp_path / "out", **settings)


def test_raises_when_transposed_experts_could_not_be_told(tmp_path, leaves_nothing):
    checkpoint = save_hosted(tmp_path / "sparse", "qwen3_vl", moe={"moe_intermediate_size": 16})
    with leaves_nothing(), pytest.raises(ValueError, match=r"gate_up_proj holds experts of 32 x 32.*by their shape"):
        exported(checkpoint, tmp_path / "out")


def test_raises_when_a_host_builds_its_llm_whatever_its_configuration_holds():
    config = hosts.config("qwen2_vl")
    fields = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values = {name: getattr(config.text_config, name) for name in fields}
    config.text_config = Qwen2MoeConfig(**values, rope_parameters=config.text_config.rope_parameters)
    with pytest.raises(ValueError, match=r"qwen2_vl (builds its LLM by Qwen2VLTextModel, whatever|cannot be built)"):
        build_native_host(config)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_the_way_back_is_refused_with_the_reason(tmp_path, family, leaves_nothing):
    out = exported(save_hosted(tmp_path / "sparse", family), tmp_path / "native")
    given = {"vlm_model": str(out), "output_dir": str(tmp_path / "out")}
    with leaves_nothing(), pytest.raises(ValueError, match="model; expected a llava one"):
        import_native(ImportArguments(**given))
