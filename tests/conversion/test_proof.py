"""The proof can fail: every mutant of a written checkpoint is refused, and the layer is named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_vlmoe import MoEConfig
from modeling_vlmoe.conversion import ProofError, UpcycleArguments, upcycle
from modeling_vlmoe.conversion.expert_init import EXPERT_INITS
from modeling_vlmoe.conversion.gaps import FLOOR_FACTOR, LIMIT, Findings, measure_gap
from modeling_vlmoe.conversion.planning import plan_upcycle
from modeling_vlmoe.conversion.probes import FEWEST_ROWS, ROWS_PER_EXPERT, probe_rows
from modeling_vlmoe.conversion.proved_writing import write_companions
from modeling_vlmoe.conversion.streaming import CheckpointReader, write_checkpoint
from modeling_vlmoe.conversion.verify import prove
from modeling_vlmoe.routers import Router
from tests import tiny
from tests.conversion.conftest import ALL_SPARSE

TEXT = "model.language_model.layers.1.mlp"
VISION = "model.vision_tower.encoder.layers.2.mlp"
CONNECTOR = "model.connector.mlp"
LAYER = "model.language_model.layers.0"
EMBEDDING = "model.language_model.embed_tokens.weight"
VIT_BIAS = "model.vision_tower.encoder.layers.0.self_attn.v_proj.bias"


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
        lambda t: change(t, f"{LAYER}.input_layernorm.weight", lambda w: w * 1.01),
        f"{LAYER}.input_layernorm.weight was not written",
    ),
    "a head row off": (lambda t: change(t, "lm_head.weight", lambda w: w.roll(1, 0)), "lm_head.weight was not"),
    "embedding rows that are no numbers": (
        lambda t: change(t, EMBEDDING, lambda w: w.index_fill(0, torch.arange(31, 320), float("nan"))),
        f"{EMBEDDING} was not written",
    ),
    "an attention bias off": (
        lambda t: change(t, f"{VIT_BIAS}", lambda b: b + 1e-2),
        f"{VIT_BIAS} was not written",
    ),
    "another router": (
        lambda t: change(t, f"{TEXT}.router.weight", lambda w: torch.randn(w.shape) * 100),
        f"{TEXT}.router.weight was not written",
    ),
    "a router in bf16": (
        lambda t: change(t, f"{TEXT}.router.weight", lambda w: w.to(torch.bfloat16)),
        rf"{TEXT}.router.weight is .*bfloat16",
    ),
    "a tensor too many": (lambda t: t.update({"extra": torch.ones(1)}), r"extra is .*expected no such tensor"),
    "a tensor too few": (lambda t: t.pop("lm_head.weight"), r"lm_head.weight is missing"),
}


def set_text(name, value):
    return lambda config: config["text_config"].__setitem__(name, value)


# What is done to a written JSON file, and what the proof says.
JSON_MUTANTS = {
    "weights not renormalised": (
        "config.json",
        set_text("norm_topk_prob", False),
        r"layers.0.mlp on random input differs by",
    ),
    "another activation": ("config.json", set_text("hidden_act", "relu"), r"layers.0.mlp on random input differs by"),
    "another norm": ("config.json", set_text("rms_norm_eps", 1e-3), r"text logits \(first astray: .* differs by"),
    "another attention": (
        "config.json",
        lambda config: config["vision_config"].update(num_attention_heads=4),
        r"vision hidden state -2 \(first astray: .* differs by",
    ),
    "another feature layer": (
        "config.json",
        lambda config: config.update(vision_feature_layer=-1),
        r"image features.* differs by",
    ),
    "fewer experts": ("config.json", set_text("num_experts", 4), r"model of the configuration that was written"),
    "another image token": ("config.json", lambda config: config.update(image_token_id=7), r"image_token_id, 7"),
    "too few image tokens": (
        "processor_config.json",
        lambda config: config.update(num_image_tokens=5),
        r"gives a picture 5 tokens \(num_image_tokens\).* gives it 9 features",
    ),
}


@pytest.fixture(scope="module")
def plan(parents, upcycled):
    return plan_upcycle(
        UpcycleArguments(text_model=str(parents / "llama"), vision_model=str(parents / "siglip"), **ALL_SPARSE)
    )


@pytest.fixture
def written(upcycled, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(upcycled, tmp_path / "written")


def test_the_proof_holds(plan, upcycled):
    findings = prove(plan, upcycled)
    assert all(0 < one.gap <= one.limit == LIMIT and one.floor is None for one in findings.judged.values())
    layers = {f"{path} on {where}" for path in plan.mlps for where in ("random input", "the dense model's input")}
    assert set(findings.judged) == layers | {
        "text logits",
        "vision hidden state -2",
        "vision last hidden state",
        "vision pooled output",
        "image features",
    }
    assert set(findings.informative) == {f"{path}, what it is given" for path in plan.mlps}


@pytest.mark.parametrize("name", MUTANTS)
def test_raises_when_what_is_written_is_a_mutant(plan, written, name):
    mutate, named = MUTANTS[name]
    tensors = load_file(written / "model.safetensors")
    mutate(tensors)
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(ProofError, match=named):
        prove(plan, written)


@pytest.mark.parametrize("reads_all", [True, False])
@pytest.mark.parametrize("change", [lambda stack: stack.roll(1, 1), lambda stack: stack * 1.5])
@pytest.mark.parametrize("expert", [0, -1])
def test_raises_when_one_expert_is_another(plan, written, reads_all, change, expert):
    tensors = load_file(written / "model.safetensors")
    stack = tensors[f"{TEXT}.experts.down_proj"]
    stack[expert] = change(stack)[expert]
    save_file(tensors, written / "model.safetensors")
    with pytest.raises(ProofError, match=rf"{TEXT}.experts.down_proj was not written as it was to be \(experts\)"):
        prove(plan, written, reads_all)


def swap_sources(one, plan):
    return replace(one, dense=one.dense[::-1])


def take_another_layer(one, plan):
    wanted = one.spec.name.replace("layers.1", "layers.2")
    return replace(one, dense=next(other.dense for other in plan.mapping.assignments if other.spec.name == wanted))


@pytest.mark.parametrize("reads_all", [True, False])
@pytest.mark.parametrize("change", [swap_sources, take_another_layer])
def test_raises_when_the_mapping_is_wrong(arguments, tmp_path, reads_all, change):
    plan = plan_upcycle(arguments(text_experts=4))
    index = next(
        i for i, one in enumerate(plan.mapping.assignments) if one.spec.name == f"{TEXT}.experts.gate_up_proj"
    )
    plan.mapping.assignments[index] = change(plan.mapping.assignments[index], plan)
    write_checkpoint(tmp_path, plan.mapping.specs, plan.mapping.blocks(plan.drawing))
    write_companions(plan, tmp_path)
    with pytest.raises(ProofError, match=rf"{TEXT} on random input differs by"):
        prove(plan, tmp_path, reads_all)


def test_what_is_read_in_part_is_judged_as_what_is_read_whole(plan, upcycled):
    whole, part = prove(plan, upcycled), prove(plan, upcycled, reads_all=False)
    assert whole == part
    stacks = {name for name in CheckpointReader(upcycled).names if ".experts." in name}
    drawn = {name for name in stacks if name.startswith(CONNECTOR)}
    assert drawn
    assert plan.mapping.repeated(plan.drawing) == stacks - drawn


def test_experts_that_are_cast_or_made_are_read_one_by_one(arguments, monkeypatch):
    plan = plan_upcycle(arguments(text_experts=4, dtype="bfloat16"))
    assert plan.mapping.repeated(plan.drawing) == set()
    plan = plan_upcycle(arguments(text_experts=4))
    monkeypatch.setitem(EXPERT_INITS, "copy", lambda dense, slot: dense * 1)
    assert plan.mapping.repeated(plan.drawing) == set()
    monkeypatch.setitem(EXPERT_INITS, "copy", lambda dense, slot: dense * 1 if slot.expert == 3 else dense)
    assert plan.mapping.repeated(plan.drawing) == set()


@pytest.mark.parametrize("name", JSON_MUTANTS)
def test_raises_when_what_is_written_describes_another_model(plan, written, name):
    file, mutate, said = JSON_MUTANTS[name]
    values = json.loads((written / file).read_text())
    mutate(values)
    (written / file).write_text(json.dumps(values))
    with pytest.raises(ProofError, match=said):
        prove(plan, written)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_raises_when_a_companion_is_missing(plan, written, file):
    (written / file).unlink()
    with pytest.raises(ProofError, match=f"{file} is missing"):
        prove(plan, written)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """An LLM of 24 layers, whose logits answer the last bit of its embeddings with more than the limit."""
    folder = tmp_path_factory.mktemp("deep")
    config = tiny.text_config("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=24)
    tiny.redraw(AutoModelForCausalLM.from_config(config), std=0.12).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def test_a_deep_parent_is_judged_by_its_own_rounding(deep, arguments, tmp_path):
    args = arguments(text_model=deep, text_experts=2)
    findings = prove(plan_upcycle(args), upcycle(args))
    logits = findings.judged["text logits"]
    assert logits.gap > LIMIT
    assert logits.limit == FLOOR_FACTOR * logits.floor
    assert all(one.limit == LIMIT for what, one in findings.judged.items() if " on " in what)


def test_raises_when_a_deep_parent_is_computed_otherwise(deep, arguments, tmp_path):
    args = arguments(text_model=deep, text_experts=2)
    out = upcycle(args)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] *= 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProofError, match=r"text logits.* differs by"):
        prove(plan_upcycle(args), out)


def test_a_result_that_is_no_number_is_never_near_enough():
    nan = torch.full((2, 2), float("nan"))
    with pytest.raises(ProofError, match=r"this differs by inf"):
        Findings().judge("this", nan, nan, lambda: nan)


def test_every_expert_is_probed_by_few_rows():
    router = Router(64, MoEConfig(num_experts=64, num_experts_per_tok=1))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    rows = probe_rows("here", router, seed=0)
    assert len(rows) <= FEWEST_ROWS + ROWS_PER_EXPERT * 64
    assert set(router(rows)[2].flatten().tolist()) == set(range(64))


def test_raises_when_an_expert_is_never_chosen():
    router = Router(16, MoEConfig(num_experts=3, num_experts_per_tok=1))
    with torch.no_grad():
        router.weight.copy_(torch.eye(3, 16))
        router.weight[2] = router.weight[0] * 0.5
        router.weight[1] = -router.weight[0]
    with pytest.raises(ProofError, match=r"here: experts \[2\] are chosen for none of"):
        probe_rows("here", router, seed=0)


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


def test_raises_when_the_dense_model_draws_at_random():
    dense, sparse, other = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ProofError, match="Nothing can be proved: features of the dense model itself moves by"):
        Findings().judge("features", dense, sparse, lambda: other)
