"""The proof can fail: every mutant of a written checkpoint is refused, and the layer is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_vlmoe.conversion import ProofError, UpcycleArguments, upcycle
from modeling_vlmoe.conversion.expert_init import EXPERT_INITS
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.probes import measure_gap
from modeling_vlmoe.conversion.verify import LIMIT, prove
from tests.conversion.conftest import ALL_SPARSE

TEXT = "model.language_model.layers.1.mlp"
VISION = "model.vision_tower.encoder.layers.2.mlp"
CONNECTOR = "model.connector.mlp"


def swap_halves(stack):
    return stack.roll(stack.shape[1] // 2, 1)


def change(tensors, name, new):
    tensors[name] = new(tensors[name].clone()).contiguous()


def one_expert(new):
    def mutate(stack):
        stack[-1] = new(stack[-1])
        return stack

    return mutate


# What is done to the written tensors, and what the proof says differs.
MUTANTS = {
    "gate and up swapped": (lambda t: change(t, f"{TEXT}.experts.gate_up_proj", swap_halves), TEXT),
    "gate and up swapped in one expert": (
        lambda t: change(t, f"{TEXT}.experts.gate_up_proj", one_expert(lambda w: w.roll(len(w) // 2, 0))),
        TEXT,
    ),
    "one expert's rows moved": (
        lambda t: change(t, f"{TEXT}.experts.down_proj", one_expert(lambda w: w.roll(1, 0))),
        TEXT,
    ),
    "one weight of one expert off": (
        lambda t: change(t, f"{TEXT}.experts.down_proj", one_expert(lambda w: w + torch.eye(*w.shape) * 1e-3)),
        TEXT,
    ),
    "another layer's experts": (
        lambda t: t.update(
            {f"{TEXT}.experts.down_proj": t[f"{TEXT.replace('.1.', '.2.')}.experts.down_proj"].clone()}
        ),
        TEXT,
    ),
    "one bias of the ViT dropped": (
        lambda t: change(t, f"{VISION}.experts.up_proj_bias", one_expert(torch.zeros_like)),
        VISION,
    ),
    "the down biases of the ViT dropped": (
        lambda t: change(t, f"{VISION}.experts.down_proj_bias", torch.zeros_like),
        VISION,
    ),
    "a bias of the connector changed": (
        lambda t: change(t, f"{CONNECTOR}.experts.down_proj_bias", lambda b: b + 1e-3),
        CONNECTOR,
    ),
    "a norm off": (
        lambda t: change(t, "model.language_model.layers.0.input_layernorm.weight", lambda w: w * 1.01),
        "text logits",
    ),
    "a head row off": (lambda t: change(t, "lm_head.weight", lambda w: w.roll(1, 0)), "text logits"),
    "an attention bias off": (
        lambda t: change(t, "model.vision_tower.encoder.layers.0.self_attn.v_proj.bias", lambda b: b + 1e-2),
        "vision hidden state -2",
    ),
    "a layer beyond the selected one off": (
        lambda t: change(t, "model.vision_tower.encoder.layers.3.mlp.fc1.bias", lambda b: b + 1e-2),
        "vision last hidden state",
    ),
}


@pytest.fixture(scope="module")
def plan(parents, upcycled):
    return plan_upcycle(
        UpcycleArguments(text_model=str(parents / "llama"), vision_model=str(parents / "siglip"), **ALL_SPARSE)
    )


def test_the_proof_holds(plan, upcycled):
    gaps = prove(plan, upcycled)
    assert 0 < max(gaps.values()) <= LIMIT
    paths = {name.partition(",")[0] for name in gaps if ", " in name}
    assert paths == set(plan.mlps)
    assert {
        "text logits",
        "vision hidden state -2",
        "vision last hidden state",
        "vision pooled output",
        "connector output",
    } < set(gaps)


@pytest.mark.parametrize("name", MUTANTS)
def test_raises_when_what_is_written_is_a_mutant(plan, upcycled, tmp_path, name):
    mutate, named = MUTANTS[name]
    tensors = load_file(upcycled / "model.safetensors")
    mutate(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ProofError, match=rf"{named}.* differs by"):
        prove(plan, tmp_path)


def test_raises_when_weights_are_not_renormalised(arguments, upcycled, leaves_nothing):
    plan = plan_upcycle(arguments(**ALL_SPARSE))
    plan.config.text_moe.norm_topk_prob = False
    with pytest.raises(ProofError, match=r"layers.0.mlp on random input differs by"):
        prove(plan, upcycled)


def test_a_failed_proof_leaves_no_checkpoint(arguments, monkeypatch, leaves_nothing):
    monkeypatch.setitem(EXPERT_INITS, "copy", lambda dense, slot: dense * (1.001 if slot.expert == 3 else 1))
    with leaves_nothing(), pytest.raises(ProofError, match=r"language_model.layers.0.mlp on random input differs by"):
        upcycle(arguments())


def test_a_failed_proof_leaves_the_old_checkpoint(arguments, monkeypatch, upcycled, tmp_path):
    shutil.copytree(upcycled, tmp_path / "out")
    before = json.loads((tmp_path / "out" / "upcycle_receipt.json").read_text())
    monkeypatch.setitem(EXPERT_INITS, "copy", lambda dense, slot: dense * 2)
    with pytest.raises(ProofError):
        upcycle(arguments(force=True))
    assert json.loads((tmp_path / "out" / "upcycle_receipt.json").read_text()) == before


@pytest.mark.parametrize(
    ("dense", "sparse", "gap"),
    [
        ([0.0, 2.0], [0.0, 2.0], 0),
        ([0.0, 2.0], [0.0, 3.0], 2**-0.5),
        ([1.0, 1.0], [1.0, 2.0], float("inf")),
        ([0.0, 1.0], [0.0, float("nan")], float("inf")),
    ],
)
def test_the_gap_is_in_standard_deviations(dense, sparse, gap):
    assert measure_gap(torch.tensor(dense), torch.tensor(sparse)) == pytest.approx(gap)
