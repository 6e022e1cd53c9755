"""`vlmoe densify` and `vlmoe compress`: what they write computes what it is to compute, and says how far it is."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.cli import app
from modeling_vlmoe.conversion import (
    CompressArguments,
    DensifyArguments,
    ExportArguments,
    ProofError,
    compress,
    densify,
    export,
    operations,
)
from modeling_vlmoe.conversion.delta_operations import best_pair, stack_pairs
from modeling_vlmoe.conversion.rewriting import REWRITE_RECEIPT_NAME, preview_rewrite
from modeling_vlmoe.conversion.summed_experts import SummedExperts
from modeling_vlmoe.delta_experts import delta_experts
from modeling_vlmoe.model_cards import render_card
from modeling_vlmoe.towers import sparse_blocks
from tests import models
from tests.conversion.sparse_checkpoints import IMAGE_TOKEN, save_hosted, save_vlmoe
from tests.models import EXPERTS, gap

DELTA = EXPERTS | {"expert_type": "delta", "expert_rank": 3}
ALL_DELTA = {"text_moe": DELTA, "vision_moe": DELTA, "connector_moe": DELTA}
ALL_FULL = {"vision_moe": EXPERTS, "connector_moe": EXPERTS}


def receipt(folder):
    return json.loads((folder / REWRITE_RECEIPT_NAME).read_text())


@torch.no_grad()
def logits(folder, dtype=torch.float32):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    inputs = models.batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == models.IMAGE_TOKEN, IMAGE_TOKEN)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.fixture(scope="module")
def delta(tmp_path_factory):
    return save_vlmoe(tmp_path_factory.mktemp("delta") / "model", **ALL_DELTA)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return save_vlmoe(tmp_path_factory.mktemp("full") / "model", **ALL_FULL)


# Densify


def test_densified_experts_compute_the_same(delta, tmp_path):
    out = densify(DensifyArguments(delta, tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert not delta_experts(model)
    assert len(sparse_blocks(model)) == 3 + 2 + 1
    assert model.config.text_moe.expert_type == "full"
    assert gap(logits(out), logits(delta)) <= 1e-5
    written = receipt(out)
    assert written["proof"]["largest_gap"] <= written["proof"]["largest_gap_limit"]
    assert "model.connector.mlp by every expert" in written["proof"]["gaps"]
    assert written["proof"]["informative"]["logits, from those by unrounded weights"] <= 1e-5


def test_the_card_says_what_became_of_the_experts(delta, tmp_path):
    out = densify(DensifyArguments(delta, tmp_path / "out"))
    card = (out / "README.md").read_text()
    assert "its delta experts summed up to whole ones (`vlmoe densify`)." in card
    assert f"{receipt(out)['parameters']['active']:,} active per token" in card
    small = compress(CompressArguments(out, 2, tmp_path / "small"))
    card = (small / "README.md").read_text()
    assert "compressed to a base and pairs of low rank (`vlmoe compress`)" in card
    assert f"moved by up to {max(receipt(small)['gaps']['informative'].values()):.1e} standard deviations" in card
    model = AutoModelForImageTextToText.from_pretrained(out)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(out)  # other weights, of which the receipt does not tell
    assert "vlmoe densify" not in render_card(out)


def test_densified_models_are_exported(delta, tmp_path):
    with pytest.raises(ValueError, match=r"vlmoe export needs experts with weights of their own.*vlmoe densify"):
        export(ExportArguments(delta, output_dir=tmp_path / "native"))
    out = densify(DensifyArguments(save_vlmoe(tmp_path / "text", text_moe=DELTA), tmp_path / "out"))
    assert export(ExportArguments(out, output_dir=tmp_path / "native")).is_dir()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_half_precision_is_rounded_once_or_not_at_all(dtype, tmp_path):
    source = save_vlmoe(tmp_path / "delta", text_moe=DELTA, dtype=torch.bfloat16)
    out = densify(DensifyArguments(source, tmp_path / "out", dtype=dtype))
    model = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    experts = model.model.language_model.layers[0].mlp.experts
    assert experts.down_proj.dtype == (torch.float32 if dtype else torch.bfloat16)
    assert model.model.language_model.layers[0].mlp.router.weight.dtype == torch.float32
    unrounded = receipt(out)["proof"]["informative"]["logits, from those by unrounded weights"]
    assert unrounded <= 1e-5 if dtype else 1e-4 < unrounded < 0.1


@pytest.mark.parametrize("is_hosted", [False, True], ids=["composite", "qwen2_5_vl"])
def test_a_cast_that_rounds_is_the_users_wish(is_hosted, tmp_path):
    folder = tmp_path / "delta"
    delta = save_hosted(folder, "qwen2_5_vl", moe=DELTA) if is_hosted else save_vlmoe(folder, text_moe=DELTA)
    out = densify(DensifyArguments(delta, tmp_path / "out", dtype="bfloat16"))
    state = AutoModelForImageTextToText.from_pretrained(out, dtype="auto").state_dict()
    assert {value.dtype for name, value in state.items() if "router" not in name} == {torch.bfloat16}
    assert {value.dtype for name, value in state.items() if "router" in name} == {torch.float32}
    unrounded = [gap for what, gap in receipt(out)["proof"]["informative"].items() if "unrounded" in what]
    assert unrounded
    assert all(1e-4 < gap < 1 for gap in unrounded)


def test_a_wrong_sum_is_no_checkpoint(delta, tmp_path, monkeypatch):
    right = operations.OPERATIONS["sum"]

    def wrong(assignment, drawing):
        yield from reversed(list(right(assignment, drawing)))

    monkeypatch.setitem(operations.OPERATIONS, "sum", wrong)
    with pytest.raises(ProofError, match="The model with whole experts is not the model with delta experts"):
        densify(DensifyArguments(delta, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_raises_when_there_is_nothing_to_densify(full, tmp_path):
    with pytest.raises(ValueError, match="has no delta experts, so there is nothing to densify"):
        densify(DensifyArguments(full, tmp_path / "out"))
    with pytest.raises(ValueError, match="Name the checkpoint: vlmoe densify CHECKPOINT"):
        densify(DensifyArguments(output_dir=tmp_path / "out"))
    with pytest.raises(ValueError, match="--dtype int8 is not known"):
        densify(DensifyArguments(full, tmp_path / "out", dtype="int8"))


# Compress


def test_best_pairs_are_those_of_the_whole_svd():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((30, 12), (12, 30)):
        matrix = torch.randn(rows, columns, generator=generator)
        a, b = best_pair(matrix, 4, generator)
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        wanted = (left[:, :4] * values[:4]) @ right[:4]
        torch.testing.assert_close((b @ a).double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_an_expert_that_is_the_base_gets_a_pair_that_can_learn():
    a, b = best_pair(torch.zeros(6, 5), 3, torch.Generator().manual_seed(0))
    assert not b.any()
    assert a.abs().min() > 0


def test_copies_are_compressed_exactly_and_come_back(tmp_path):
    source = save_vlmoe(tmp_path / "unlike", **ALL_FULL)
    model = AutoModelForImageTextToText.from_pretrained(source)
    with torch.no_grad():
        for _, block in sparse_blocks(model):
            for value in block.experts.parameters():
                value.copy_(value[:1].expand_as(value))
    model.save_pretrained(tmp_path / "copies")
    models.processor().save_pretrained(tmp_path / "copies")
    small = compress(CompressArguments(tmp_path / "copies", 2, tmp_path / "small"))
    assert gap(logits(small), logits(tmp_path / "copies")) <= 1e-5
    assert all(error["max"] == 0 for error in receipt(small)["weight_errors"].values())
    again = densify(DensifyArguments(small, tmp_path / "again"))
    states = [AutoModelForImageTextToText.from_pretrained(one).state_dict() for one in (tmp_path / "copies", again)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_experts_that_differ_by_the_rank_come_back(delta, tmp_path):
    """A base and pairs of rank 3 for 4 experts: apart from their mean they have rank 12."""
    whole = densify(DensifyArguments(delta, tmp_path / "whole"))
    small = compress(CompressArguments(whole, 12, tmp_path / "small"))
    assert max(error["max"] for error in receipt(small)["weight_errors"].values()) < 1e-5
    assert gap(logits(small), logits(delta)) <= 1e-4


def test_the_error_is_reported_and_falls_with_the_rank(full, tmp_path):
    errors, gaps = [], []
    for rank in (1, 8, 24):
        out = compress(CompressArguments(full, rank, tmp_path / f"rank{rank}"))
        written = receipt(out)
        name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
        errors.append(written["weight_errors"][name]["mean"])
        gaps.append(written["gaps"]["informative"]["logits"])
        assert len(written["weight_errors"]) == 2 * 6
        assert gap(logits(out), logits(full)) > 1e-3
    assert errors[0] > errors[1] > errors[2] > 0
    assert gaps[0] > gaps[2] > 0
    stack = AutoModelForImageTextToText.from_pretrained(full).get_parameter(name).detach()
    apart = stack - stack.mean(0)
    values = torch.linalg.svdvals(apart)
    wanted = values[:, 24:].square().sum(-1).sqrt() / stack.flatten(1).norm(dim=1)
    assert errors[2] == pytest.approx(wanted.mean().item(), rel=1e-4)


def test_an_expert_of_zeros_has_an_error_that_is_a_number(tmp_path):
    source = save_vlmoe(tmp_path / "model", **ALL_FULL)
    model = AutoModelForImageTextToText.from_pretrained(source)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.experts.down_proj[1] = 0
        model.model.language_model.layers[1].mlp.experts.down_proj.zero_()
    model.save_pretrained(source)
    errors = receipt(compress(CompressArguments(source, 2, tmp_path / "small")))["weight_errors"]
    found = [errors[f"model.language_model.layers.{layer}.mlp.experts.down_proj"]["max"] for layer in (0, 1)]
    assert 0 < found[0] < 10
    assert found[1] == 0


def test_a_half_precision_base_leaves_its_rounding_to_the_pairs(tmp_path):
    class Stack:
        def __init__(self, value):
            self.value = value

        def read(self):
            return self.value

    stack = torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    base, a, b = stack_pairs(Stack(stack), 10, 0, "stack", torch.bfloat16)
    whole = base.float() + b.float() @ a.float()
    assert (whole - stack.float()).abs().max() < 0.03


def test_the_smaller_model_is_trained(full, tmp_path):
    out = compress(CompressArguments(full, 2, tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(out).train()
    model(input_ids=torch.arange(6, 20)[None], labels=torch.arange(6, 20)[None]).loss.backward()
    trained = [name for name, value in model.named_parameters() if value.grad is not None and "deltas" in name]
    assert len(trained) == 3 * 4


def test_raises_when_there_is_nothing_to_compress(delta, full, tmp_path):
    with pytest.raises(ValueError, match=r"has no whole experts, but delta experts, which are small already"):
        compress(CompressArguments(delta, 4, tmp_path / "out"))
    with pytest.raises(ValueError, match="Give --rank"):
        compress(CompressArguments(full, None, tmp_path / "out"))
    with pytest.raises(ValueError, match="--rank is 0; expected 1 or more"):
        CompressArguments(full, 0, tmp_path / "out")
    with pytest.raises(ValueError, match=r"expert_rank is 40, but .* a side of 24: a rank above that adds nothing"):
        compress(CompressArguments(full, 40, tmp_path / "out"))


# Commands


def run(*words):
    from typer.testing import CliRunner

    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output


def test_the_commands_say_what_they_did(delta, full, tmp_path):
    said = run("densify", delta, "--output-dir", tmp_path / "whole")
    assert "proved equal: largest gap" in said
    said = run("compress", full, "--rank", 2, "--output-dir", tmp_path / "small")
    assert "model.connector.mlp.experts.down_proj: relative error" in said
    assert "logits: " in said
    assert "standard deviations away" in said
    said = run("densify", delta, "--dry-run")
    assert "sum     3 x model.language_model.layers.*.mlp.experts.down_proj [4, 32, 48]" in said
    assert "best a  " in preview_rewrite("compress", CompressArguments(full, 2))


def test_the_oracle_sums_by_itself(delta):
    """The proof's side of it is another loop over other weights than the kernel's."""
    model = AutoModelForImageTextToText.from_pretrained(delta)
    for _, experts in delta_experts(model):
        width = experts.weight_shapes[experts.input_stack][1]
        x = torch.randn(9, width)
        weight, expert = torch.rand(9, 4).topk(2)
        summed = SummedExperts(experts, torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(summed(x, expert, weight), experts(x, expert, weight), rtol=1e-5, atol=1e-5)
