"""The proof of an export can fail: every mutant is refused, and what differs is named."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import ExportArguments, ProofError, export
from modeling_vlmoe.conversion.export import open_checkpoint, write_companions
from modeling_vlmoe.conversion.export_plan import plan_export
from modeling_vlmoe.conversion.export_proof import ExportProof, prove_export
from modeling_vlmoe.conversion.native_targets import PAIRS
from modeling_vlmoe.conversion.streaming import write_checkpoint
from tests.conversion.sparse_checkpoints import save_vlmoe
from tests.models import gap

LIMIT = 1e-5


def exported(checkpoint, out, **settings):
    return export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(out), **settings))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Qwen3 with unlike experts, to be read only."""
    return save_vlmoe(tmp_path_factory.mktemp("export") / "vlmoe", "qwen3", "clip", [0, 2])


@pytest.fixture(scope="module")
def plan(checkpoint):
    return plan_export(ExportArguments(checkpoint=str(checkpoint)), open_checkpoint(str(checkpoint), checkpoint))


@pytest.fixture(scope="module")
def native(checkpoint, tmp_path_factory):
    return exported(checkpoint, tmp_path_factory.mktemp("export") / "llava")


@pytest.fixture
def written(native, tmp_path):
    """A copy of the exported checkpoint, to be damaged."""
    return shutil.copytree(native, tmp_path / "written")


def test_the_proof_holds(plan, native):
    findings = prove_export(plan, native)
    assert all(one.gap <= one.limit == LIMIT for one in findings.judged.values())
    kinds = ("random input", "the dense model's input", "every expert")
    assert {what for what in findings.judged if what.startswith("layers.")} == {
        f"layers.{index}.mlp {'by' if kind == 'every expert' else 'on'} {kind}" for index in (0, 2) for kind in kinds
    }
    assert {"logits", "image features"} <= set(findings.judged)
    assert {f"logits in bfloat16, {side}, from those in float32" for side in ("vlmoe", "exported")} <= set(
        findings.informative
    )


EXPERT = "language_model.model.layers.2.mlp.experts.{}.down_proj.weight"


def swap_experts(plan):
    swap(plan, EXPERT.format(1), EXPERT.format(3))


def take_another_layer(plan):
    swap(plan, EXPERT.format(1), EXPERT.format(1).replace("layers.2", "layers.0"), both=False)


def swap_gate_and_up(plan):
    swap(plan, EXPERT.format(0).replace("down", "gate"), EXPERT.format(0).replace("down", "up"))


def swap_projector(plan):
    swap(plan, "multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_2.bias")


def swap(plan, one, other, both=True):
    """Fills a target with what another is made of, and the other way round."""
    places = {assignment.spec.name: place for place, assignment in enumerate(plan.mapping.assignments)}
    first, second = (plan.mapping.assignments[places[name]] for name in (one, other))
    plan.mapping.assignments[places[one]] = replace(first, dense=second.dense)
    if both:
        plan.mapping.assignments[places[other]] = replace(second, dense=first.dense)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_experts, r"layers.2.mlp (on|by) .* differs by"),
        (take_another_layer, r"layers.2.mlp (on|by) .* differs by"),
        (swap_gate_and_up, r"layers.2.mlp (on|by) .* differs by"),
        (swap_projector, r"image features differs by"),
    ],
)
def test_raises_when_the_mapping_is_wrong(checkpoint, tmp_path, change, said):
    plan = plan_export(ExportArguments(checkpoint=str(checkpoint)), open_checkpoint("it", checkpoint))
    change(plan)
    write_checkpoint(tmp_path, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
    write_companions(plan, tmp_path)
    with pytest.raises(ProofError, match=f"The exported model is not the vlmoe model: {said}"):
        prove_export(plan, tmp_path)


def test_an_expert_that_no_router_chooses_is_proved_too(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", "llama", text_moe={"num_experts": 5})
    tensors = load_file(checkpoint / "model.safetensors")
    router = tensors[name := "model.language_model.layers.0.mlp.router.weight"]
    # Of five parallel rows, top-2 takes two at one end: never the one in the middle.
    tensors[name] = torch.cat([router[:1] * scale for scale in (-2, -1, 0, 1, 2)])
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    plan = plan_export(ExportArguments(checkpoint=str(checkpoint)), open_checkpoint("it", checkpoint))
    name = "language_model.model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    swap(plan, name.format(2), name.format(3), both=False)
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", plan.mapping.specs, plan.mapping.blocks(plan.drawing))
    write_companions(plan, tmp_path / "out")
    with pytest.raises(ProofError, match=r"layers.0.mlp by every expert differs by"):
        prove_export(plan, tmp_path / "out")


JSON_MUTANTS = {
    "weights not renormalised": (
        lambda config: config["text_config"].update(norm_topk_prob=False),
        r"layers.0.mlp on random input differs by",
    ),
    "another norm": (lambda config: config["text_config"].update(rms_norm_eps=1e-2), r"differs by"),
    "another rope": (
        lambda config: config["text_config"]["rope_parameters"].update(rope_theta=100.0),
        r"logits differs by",
    ),
    "another activation": (lambda config: config.update(projector_hidden_act="relu"), r"image features differs by"),
    "another feature layer": (lambda config: config.update(vision_feature_layer=-1), r"image features differs by"),
    "fewer experts for a token": (lambda config: config["text_config"].update(num_experts_per_tok=1), r"differs by"),
}


# What no run of some dozen tokens sees, nor one that does not train.
SILENT_MUTANTS = {
    "a shorter context": ({"max_position_embeddings": 64}, "max_position_embeddings 64 of the LLM"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout 0.1 of the LLM"),
    "other settings of a window that is": ({"sliding_window": 65}, "sliding_window 65 of the LLM"),
    "no window": ({"sliding_window": None}, "says windows"),
    "scaled positions": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 4096,
            }
        },
        "rope_parameters",
    ),
}


@pytest.mark.parametrize("name", SILENT_MUTANTS)
def test_raises_when_the_configuration_would_show_later(tmp_path, name):
    text = {"sliding_window": 64}
    if name == "scaled positions":
        rope = SILENT_MUTANTS[name][0]["rope_parameters"] | {"long_factor": [4.0] * 4}
        text |= {"max_position_embeddings": 8192, "rope_parameters": rope}
    checkpoint = save_vlmoe(tmp_path / "vlmoe", "mistral", text=text)
    plan = plan_export(ExportArguments(checkpoint=str(checkpoint)), open_checkpoint("it", checkpoint))
    written = exported(checkpoint, tmp_path / "out")
    config = json.loads((written / "config.json").read_text())
    changed, said = SILENT_MUTANTS[name]
    config["text_config"].update(changed)
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProofError, match=said):
        prove_export(plan, written)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gap_in_bfloat16_is_the_real_one(tmp_path, dtype):
    """Of a model with biases, which a kernel adds before it rounds."""
    checkpoint = save_vlmoe(tmp_path / "vlmoe", "qwen2", dtype=dtype)
    plan = plan_export(ExportArguments(checkpoint=str(checkpoint)), open_checkpoint("it", checkpoint))
    proof = ExportProof(plan, exported(checkpoint, tmp_path / "out"))
    inputs = proof.inputs(proof.prove_images())
    proof.prove_text(proof.prove_images())
    loaded = partial(AutoModelForImageTextToText.from_pretrained, experts_implementation="eager")
    for side, folder in (("vlmoe", checkpoint), ("exported", tmp_path / "out")):
        exact, rounded = (
            loaded(folder, dtype=kind).eval()(**inputs).logits for kind in (torch.float32, torch.bfloat16)
        )
        said = proof.findings.informative[f"logits in bfloat16, {side}, from those in float32"]
        assert said == pytest.approx(gap(rounded.float(), exact), rel=1e-3)


@pytest.mark.parametrize("name", JSON_MUTANTS)
def test_raises_when_the_configuration_is_another(plan, written, name):
    mutate, said = JSON_MUTANTS[name]
    config = json.loads((written / "config.json").read_text())
    mutate(config)
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProofError, match=said):
        prove_export(plan, written)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_additional_image_tokens", 5, "other input_ids"),
        ("image_processor", {"do_normalize": False}, "other pixel_values"),
    ],
)
def test_raises_when_the_processor_is_another(plan, written, name, value, said):
    values = json.loads((written / "processor_config.json").read_text())
    values[name] = values[name] | value if isinstance(value, dict) else value
    (written / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(ProofError, match=said):
        prove_export(plan, written)


def test_raises_when_what_is_written_is_another_expert(plan, written):
    tensors = load_file(written / "model.safetensors")
    tensors[EXPERT.format(1)] = tensors[EXPERT.format(3)].clone()
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(ProofError, match=r"experts.1.down_proj.weight was not written"):
        prove_export(plan, written)


def test_a_failed_proof_leaves_nothing(checkpoint, tmp_path, monkeypatch, leaves_nothing):
    monkeypatch.setitem(PAIRS[0].sparse.no_effect, "hidden_act", "relu")
    with leaves_nothing(), pytest.raises(ProofError, match="The exported model is not the vlmoe model"):
        exported(checkpoint, tmp_path / "out")
