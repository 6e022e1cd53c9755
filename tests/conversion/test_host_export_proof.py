"""The proof of a host's export can fail: every mutant is refused, and what differs is named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import is_torchvision_available

from modeling_vlmoe.conversion import ExportArguments, ProofError, export
from modeling_vlmoe.conversion.export import open_checkpoint, write_companions
from modeling_vlmoe.conversion.host_export import plan_host_export
from modeling_vlmoe.conversion.host_export_proof import prove_host_export
from modeling_vlmoe.conversion.host_mapping import TransposedRows
from modeling_vlmoe.conversion.streaming import write_checkpoint
from tests.conversion.sparse_checkpoints import save_hosted

BLOCK = "model.language_model.layers.{}.mlp."


def exported(checkpoint, out):
    return export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(out)))


def planned(checkpoint):
    return plan_host_export(ExportArguments(checkpoint=str(checkpoint)), open_checkpoint("it", checkpoint))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Qwen3-VL with unlike experts, to be read only."""
    return save_hosted(tmp_path_factory.mktemp("hosts") / "sparse", "qwen3_vl", [0, 2])


@pytest.fixture(scope="module")
def plan(checkpoint):
    return planned(checkpoint)


@pytest.fixture(scope="module")
def native(checkpoint, tmp_path_factory):
    return exported(checkpoint, tmp_path_factory.mktemp("hosts") / "native")


@pytest.fixture
def written(native, tmp_path):
    """A copy of the exported checkpoint, to be damaged."""
    return shutil.copytree(native, tmp_path / "written")


def test_the_proof_holds(plan, native):
    findings = prove_host_export(plan, native)
    assert all(one.gap <= one.limit for one in findings.judged.values())
    kinds = ("on random input", "on the dense model's input", "by every expert")
    wanted = {f"model.language_model.layers.{index}.mlp {kind}" for index in (0, 2) for kind in kinds}
    given = {"a picture and text", "text", *(["a video and text"] if is_torchvision_available() else [])}
    assert wanted | {f"logits of {what}" for what in given} == set(findings.judged)


def swap(plan, one, other, both=True):
    """Fills a target with what another is made of, and the other way round."""
    places = {assignment.spec.name: place for place, assignment in enumerate(plan.mapping.assignments)}
    first, second = (plan.mapping.assignments[places[name]] for name in (one, other))
    plan.mapping.assignments[places[one]] = replace(first, dense=second.dense)
    if both:
        plan.mapping.assignments[places[other]] = replace(second, dense=first.dense)


def shift_experts(plan):
    name = f"{BLOCK.format(2)}experts.down_proj"
    place = next(at for at, one in enumerate(plan.mapping.assignments) if one.spec.name == name)
    one = plan.mapping.assignments[place]
    plan.mapping.assignments[place] = replace(one, dense=one.dense[1:] + one.dense[:1])


def take_another_layers_router(plan):
    swap(plan, f"{BLOCK.format(2)}gate.weight", f"{BLOCK.format(0)}gate.weight", both=False)


def swap_deepstack(plan):
    swap(plan, "model.visual.merger.linear_fc1.weight", "model.visual.deepstack_merger_list.0.linear_fc1.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shift_experts, r"layers.2.mlp (on|by) .* differs by"),
        (take_another_layers_router, r"layers.2.mlp (on|by) .* differs by"),
        (swap_deepstack, r"logits of a picture and text differs by"),
    ],
)
def test_raises_when_the_mapping_is_wrong(checkpoint, tmp_path, change, said):
    plan = planned(checkpoint)
    change(plan)
    write_checkpoint(tmp_path, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
    write_companions(plan, tmp_path)
    with pytest.raises(ProofError, match=f"The exported model is not the vlmoe model: .*{said}"):
        prove_host_export(plan, tmp_path)


def test_raises_when_experts_are_not_transposed(plan, written):
    """transformers would read them; servers, which always transpose, would not."""
    tensors = load_file(written / "model.safetensors")
    name = f"{BLOCK.format(0)}experts.gate_up_proj"
    tensors[name] = tensors[name].mT.contiguous()
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(ProofError, match=r"experts.gate_up_proj is .*shape=\(4, 96, 32\)"):
        prove_host_export(plan, written)


JSON_MUTANTS = {
    "another norm": (lambda config: config["text_config"].update(rms_norm_eps=1e-2), "differs by"),
    "fewer experts for a token": (lambda config: config["text_config"].update(num_experts_per_tok=1), "differs by"),
    "other sections of positions": (
        lambda config: config["text_config"]["rope_parameters"].update(mrope_section=[2, 1, 1]),
        "rope_parameters",
    ),
    "other layers of the ViT for deepstack": (
        lambda config: config["vision_config"].update(deepstack_visual_indexes=[1]),
        "logits of a picture and text differs by",
    ),
    "a shorter context": (
        lambda config: config["text_config"].update(max_position_embeddings=64),
        "max_position_embeddings 64 of the LLM",
    ),
    "another token of videos": (
        lambda config: config.update(video_token_id=7),
        "(video_token_id 7 of the whole|cannot be run on a video and text)",
    ),
    "what only training sees": (
        lambda config: config["vision_config"].update(initializer_range=0.5),
        "initializer_range 0.5 of the vision_config",
    ),
}


@pytest.mark.parametrize("name", JSON_MUTANTS)
def test_raises_when_the_configuration_is_another(plan, written, name):
    mutate, said = JSON_MUTANTS[name]
    config = json.loads((written / "config.json").read_text())
    mutate(config)
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProofError, match=said):
        prove_host_export(plan, written)


def test_raises_when_the_processor_is_another(plan, written):
    values = json.loads((written / "processor_config.json").read_text())
    (written / "processor_config.json").write_text(json.dumps(values | {"image_processor": {}}))
    with pytest.raises(ProofError, match=r"processor_config.json of the processor was not copied as it is"):
        prove_host_export(plan, written)


def test_raises_when_what_is_written_is_another_expert(plan, written):
    tensors = load_file(written / "model.safetensors")
    stack = tensors[f"{BLOCK.format(2)}experts.down_proj"]
    stack[1] = stack[3]
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(ProofError, match=r"experts.down_proj was not written as it was to be"):
        prove_host_export(plan, written)


def test_a_failed_proof_leaves_nothing(checkpoint, tmp_path, monkeypatch, leaves_nothing):
    monkeypatch.setattr(TransposedRows, "read", lambda rows: torch.zeros(rows.shape))
    with leaves_nothing(), pytest.raises(ProofError, match="The exported model is not the vlmoe model"):
        exported(checkpoint, tmp_path / "out")
