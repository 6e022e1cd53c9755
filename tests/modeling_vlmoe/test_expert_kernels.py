"""The kernel of experts with weights of their own on a CPU, and when it runs."""

import pytest
import torch

from modeling_vlmoe import expert_kernels, expert_paths
from modeling_vlmoe.expert_paths import Paths, row_step
from modeling_vlmoe.grouped_experts import full_experts, run_grouped
from modeling_vlmoe.shared_base import LowRank
from tests.modeling_vlmoe.expert_oracles import DENSE_MLPS, GatedMLP, block, loop, route, stacks_of
from tests.modeling_vlmoe.test_delta_experts import gradients

BIG = 2**30


def pairs_for(experts, rank=3):
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name in experts.stacks:
        num_experts, rows, columns = getattr(experts, name).shape
        a, b = (
            torch.randn(num_experts, *shape, generator=generator).mul_(0.2).requires_grad_()
            for shape in ((rank, columns), (rows, rank))
        )
        made[name] = LowRank(a, b, scale=1.7)
    return made


def pairs_of_rank(experts, rank):
    return pairs_for(experts, rank) if rank else {}


@pytest.mark.parametrize("rank", [0, 3, 4], ids=["weights", "weights and pairs", "several experts at once"])
@pytest.mark.parametrize("kind", DENSE_MLPS, ids=str)
def test_the_kernel_is_the_loop(kind, rank):
    experts = block(DENSE_MLPS[kind]()).experts
    pairs = pairs_of_rank(experts, rank)
    x = torch.randn(23, 16, requires_grad=True)
    weight, expert = route(23, 5, 2)
    trained = [one for pair in pairs.values() for one in (pair.a, pair.b)]
    inputs = [x, weight, *experts.parameters(), *trained]
    stacks = stacks_of(experts)
    stacks |= {name: stacks[name] + 1.7 * pair.b @ pair.a for name, pair in pairs.items()}
    wanted = loop(experts, stacks, x, expert, weight)
    full = full_experts(experts, up_pair=pairs.get(experts.input_stack), down_pair=pairs.get("down_proj"))
    found = run_grouped(full, x, expert, weight)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 3, 8], ids=["weights", "weights and pairs", "several experts at once"])
def test_many_experts_in_half_precision(rank, monkeypatch):
    """Rows that are added for the kernels' sake are in no result and in no gradient."""
    monkeypatch.setattr(expert_paths, "BLOCK_BYTES", 48 * 96 * 2)
    experts = block(GatedMLP(bias=True), num_experts=40).experts
    pairs = pairs_of_rank(experts, rank)
    x = torch.randn(60, 16)
    weight, expert = route(60, 40, 3)

    def results(dtype):
        made = experts.to(dtype)
        given = x.to(dtype).requires_grad_()
        cast = {name: LowRank(pair.a.to(dtype), pair.b.to(dtype), pair.scale) for name, pair in pairs.items()}
        full = full_experts(made, up_pair=cast.get("gate_up_proj"), down_pair=cast.get("down_proj"))
        out = run_grouped(full, given, expert, weight.to(dtype))
        trained = [one for pair in pairs.values() for one in (pair.a, pair.b)]
        return [out, *gradients(out, [given, weight, *experts.parameters(), *trained])]

    for found, wanted in zip(results(torch.bfloat16), results(torch.float32), strict=True):
        assert (found.float() - wanted.float()).abs().max() <= 0.04 * wanted.float().abs().max()


@pytest.mark.parametrize("are_joined", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_is_in_one_group_with_its_expert(dtype, are_joined):
    """Half precision knows few numbers of rows, whatever the routing."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        expert = (torch.rand(300, 24, generator=generator) + 0.3 * torch.arange(24) / 24).topk(2).indices
        groups = Paths(expert, 24).groups(dtype, most_rows=64, are_joined=are_joined)
        real = torch.cat([one.paths if one.is_real is None else one.paths[one.is_real] for one in groups])
        assert torch.equal(real.sort().values, torch.arange(600))
        for group in groups:
            of_rows = expert.flatten()[group.paths]
            ends = group.paths.new_tensor([len(group.paths)]) if group.ends is None else group.ends.long()
            counts = torch.diff(ends, prepend=ends.new_zeros(1))
            is_right = of_rows == torch.tensor(group.experts).repeat_interleave(counts)
            assert is_right.all()  # repeats too
            assert torch.equal(group.tokens, group.paths // 2)
            if dtype is torch.bfloat16:
                assert set(counts.tolist()) <= {0, 16, 32, 48, 64}
        if dtype is torch.bfloat16:
            assert {len(group.paths) for group in groups} <= {16, 32, 48, 64}
        elif are_joined:
            assert {len(group.paths) for group in groups} == {64, 600 % 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_with_few_paths_share_a_group_and_none_is_cut(dtype):
    expert = torch.arange(640).remainder(8).clamp(min=2).view(320, 2)  # of 8, the third has half of all
    groups = Paths(expert, 9).groups(dtype, most_rows=192, are_joined=True, are_cut=False)
    assert [list(group.experts) for group in groups] == [[2], [3, 4], [5, 6], [7]]
    assert [len(group.paths) for group in groups] == (
        [256, 192, 192, 96] if dtype is torch.bfloat16 else [240, 160, 160, 80]
    )


def test_rounding_adds_little_and_leaves_few_numbers():
    rounded = {rows: rows + -rows % row_step(rows) for rows in range(1, 2049)}
    assert all(after - rows < max(16, 0.5 * rows) for rows, after in rounded.items())
    assert len(set(rounded.values())) < 40


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("kind", ["gated with biases", "plain of three widths"])
def test_half_precision_rounds_and_no_more(kind, implementation):
    made = block(DENSE_MLPS[kind]())
    experts = made.experts
    with torch.no_grad():
        for value in experts.parameters():
            value.mul_(0.5)
    x = torch.randn(70, 16)
    weight, expert = route(70, 5, 2)
    wanted = loop(experts, stacks_of(experts), x, expert, weight)
    experts.config._experts_implementation_internal = implementation
    found = experts.to(torch.bfloat16)(x.bfloat16(), expert, weight)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() <= 0.05 * wanted.abs().max()


@pytest.mark.parametrize(
    ("implementation", "dtype", "num_tokens", "most_copied", "is_ours"),
    [
        ("grouped_mm", torch.bfloat16, 64, BIG, True),
        ("grouped_mm", torch.bfloat16, 2, BIG, False),
        ("grouped_mm", torch.float32, 64, BIG, False),
        ("eager", torch.bfloat16, 64, 0, False),
        ("batched_mm", torch.float32, 64, BIG, False),
        ("batched_mm", torch.float32, 64, 10_000, True),
    ],
)
def test_detours_are_taken_where_the_hosts_kernels_are_slow(
    implementation, dtype, num_tokens, most_copied, is_ours, monkeypatch
):
    monkeypatch.setattr(expert_kernels, "MOST_COPIED", most_copied)
    experts = block(GatedMLP()).experts.to(dtype)
    experts.config._experts_implementation_internal = implementation
    x, (_, expert) = torch.zeros(num_tokens, 16, dtype=dtype), route(num_tokens, 5, 2)
    assert expert_kernels.takes_rounded(experts, x, expert) == is_ours
    experts._is_expert_parallel = True
    assert not expert_kernels.takes_rounded(experts, x, expert)


def test_raises_when_no_kernel_has_the_name():
    experts = block(GatedMLP()).experts
    experts.config._experts_implementation_internal = "fast"
    with pytest.raises(KeyError, match="fast"):
        experts(torch.zeros(2, 16), *reversed(route(2, 5, 2)))


@pytest.mark.parametrize("num_picked", [1, 2, 3])
def test_half_precision_sums_of_weighted_results_are_rounded_once(num_picked):
    """The router's weights are float32: so is what is summed, and no term overflows on its own."""
    torch.manual_seed(0)
    experts = block(GatedMLP(), num_experts=4).experts.half()
    with torch.no_grad():
        experts.down_proj.mul_(2e4)
    x, (weight, expert) = torch.randn(40, 16).half(), route(40, 4, num_picked)
    terms = [
        run_grouped(full_experts(experts), x, expert[:, pick : pick + 1], torch.ones(40, 1)).float()
        * weight[:, pick : pick + 1]
        for pick in range(num_picked)
    ]
    out = run_grouped(full_experts(experts), x, expert, weight)
    assert torch.equal(out, sum(terms).half())


@pytest.mark.parametrize("expert_type", ["full", "delta"])
@pytest.mark.parametrize("shape", [(0, 16), (1, 0, 16)])
def test_a_block_gives_nothing_of_no_tokens(expert_type, shape):
    delta = {"expert_type": "delta", "expert_rank": 4} if expert_type == "delta" else {}
    assert block(GatedMLP(), **delta)(torch.zeros(shape)).shape == shape
