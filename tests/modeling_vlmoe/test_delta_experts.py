"""Delta experts: one base, a pair per expert. Their oracle is a loop over the experts with summed weights."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.measuring import count_operations
from modeling_vlmoe import MoEConfig, expert_paths, shared_base
from modeling_vlmoe.mlp_layouts import find_layout
from modeling_vlmoe.sparse_moe import SparseMoE
from tests import tiny
from tests.modeling_vlmoe.expert_oracles import DENSE_MLPS, GatedMLP, block, loop, route, stacks_of
from tests.models import batch, gap, sparse_config, sparse_model

# Which products of low rank go by group, and which go all at once under a mask.
FORMS = {"grouped": (0, False), "stacked": (10**6, False), "masked": (10**6, True)}


@pytest.fixture(params=FORMS, ids=str)
def form(request, monkeypatch):
    most_stacked, masked = FORMS[request.param]
    monkeypatch.setattr(shared_base, "MOST_STACKED", most_stacked)
    if masked:
        monkeypatch.setattr(shared_base, "is_masked", lambda *args: True)
    return request.param


def gradients(out, inputs):
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float32).to(out.dtype)
    return torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)


def both_ways(experts, num_tokens=23, num_picked=2):
    """(output, gradients) by the kernel and by the loop, of everything that is trained."""
    width = experts.weight_shapes[experts.input_stack][1]
    x = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight, expert = route(num_tokens, experts.num_experts, num_picked)
    inputs = [x, weight, *(one for one in experts.parameters() if one.requires_grad)]
    results = []
    for out in (experts(x, expert, weight), loop(experts, stacks_of(experts), x, expert, weight)):
        results.append((out, gradients(out, inputs)))
    return results


@pytest.mark.parametrize("rank", [3, 4], ids=["each expert apart", "several at once"])
@pytest.mark.parametrize("kind", DENSE_MLPS, ids=str)
def test_delta_experts_are_their_summed_weights(kind, rank, form):
    experts = block(DENSE_MLPS[kind](), expert_type="delta", expert_rank=rank).experts
    (out, found), (wanted_out, wanted) = both_ways(experts)
    torch.testing.assert_close(out, wanted_out, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_blocks_of_rows_are_cut_anywhere(monkeypatch):
    monkeypatch.setattr(expert_paths, "BLOCK_BYTES", 1)
    monkeypatch.setattr(expert_paths, "BLOCK_ROWS", 3)
    experts = block(GatedMLP(bias=True), expert_type="delta", expert_rank=4).experts
    (out, found), (wanted_out, wanted) = both_ways(experts)
    torch.testing.assert_close(out, wanted_out, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("num_experts", "num_picked"), [(1, 1), (5, 5), (40, 3)])
def test_any_number_of_experts(num_experts, num_picked, form):
    experts = block(GatedMLP(), expert_type="delta", num_experts=num_experts, num_experts_per_tok=num_picked).experts
    (out, _), (wanted, _) = both_ways(experts, num_picked=num_picked)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_no_tokens_give_nothing(form):
    experts = block(GatedMLP(), expert_type="delta").experts
    x, (weight, expert) = torch.zeros(0, 16, requires_grad=True), route(0, 5, 2)
    out = experts(x, expert, weight)
    out.sum().backward()
    assert out.shape == (0, 16)


@pytest.mark.parametrize("kind", ["gated", "plain of three widths"])
def test_new_delta_experts_are_the_dense_mlp(kind):
    mlp = tiny.redraw(DENSE_MLPS[kind]())
    moe = MoEConfig(num_experts=4, expert_type="delta", expert_rank=2)
    made = SparseMoE(tiny.text_config("llama"), moe, mlp, num_layers=1)
    made.router.reset_parameters()
    made.experts.copy_dense(mlp, find_layout(mlp, "mlp"))
    x = torch.randn(9, 16)
    torch.testing.assert_close(made(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert all(value.abs().max() > 0 for name, value in made.experts.deltas.named_parameters() if name.endswith("_a"))


def test_the_base_can_be_frozen(form):
    experts = block(GatedMLP(), expert_type="delta", train_expert_base=False).experts
    frozen = {name for name, value in experts.named_parameters() if not value.requires_grad}
    assert frozen == {"gate_up_proj", "down_proj"}
    (_, found), (_, wanted) = both_ways(experts)
    assert len(found) == 2 + 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_and_no_more(dtype, form):
    experts = block(GatedMLP(bias=True), expert_type="delta").experts
    with torch.no_grad():  # as large as in a model that is no test's
        for value in experts.parameters():
            value.mul_(0.5)
    low = copy.deepcopy(experts).to(dtype)
    x, (weight, expert) = torch.randn(50, 16), route(50, 5, 2)
    inputs = [[one.detach().requires_grad_() for one in (x.to(kind), weight)] for kind in (dtype, torch.float32)]
    results = []
    for made, (x_in, weight_in) in zip((low, experts), inputs, strict=True):
        out = made(x_in, expert, weight_in)
        assert out.dtype == x_in.dtype
        results.append((out, *gradients(out, [x_in, weight_in, *made.parameters()])))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other).abs().max() <= 0.06 * other.abs().max()


@pytest.mark.parametrize("kind", DENSE_MLPS, ids=str)
def test_autocast_computes_in_half_and_gives_whole_gradients(kind, form):
    """A learnt activation and a norm, of float32 weights, too; and in whatever autocast backward runs."""
    experts = block(DENSE_MLPS[kind](), expert_type="delta").experts
    x, (weight, expert) = torch.randn(30, 16, requires_grad=True), route(30, 5, 2)
    out = experts(x, expert, weight)
    inputs = [x, weight, *experts.parameters()]
    wanted = [out, *gradients(out, inputs)]
    for is_inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = experts(x, expert, weight)
            assert out.dtype == torch.bfloat16
            found = gradients(out, inputs) if is_inside else None
        found = found or gradients(out, inputs)
        assert all(one.dtype == value.dtype for one, value in zip(found, inputs, strict=True))
        for one, other in zip([out, *found], wanted, strict=True):
            assert (one.float() - other).norm() <= 0.1 * other.norm()


def test_half_precision_sums_gradients_of_pairs_in_float32(monkeypatch):
    """Over many blocks of rows too."""
    monkeypatch.setattr(shared_base, "MOST_STACKED", 0)
    experts = block(GatedMLP(), expert_type="delta", num_experts=2, expert_rank=8).experts.to(torch.bfloat16)
    x, (weight, expert) = torch.randn(4096, 16).bfloat16(), route(4096, 2, 1)
    errors = []
    for block_rows in (4096, 32):
        monkeypatch.setattr(expert_paths, "block_rows", lambda width, dtype, rows=block_rows: rows)
        monkeypatch.setattr(shared_base, "block_rows", lambda width, dtype, rows=block_rows: rows)
        found = gradients(experts(x, expert, weight), [*experts.deltas.parameters()])
        exact = copy.deepcopy(experts).float()
        wanted = gradients(exact(x.float(), expert, weight), [*exact.deltas.parameters()])
        errors.append(
            [((one.float() - other).norm() / other.norm()).item() for one, other in zip(found, wanted, strict=True)]
        )
    assert all(cut <= 1.2 * whole + 1e-3 for whole, cut in zip(*errors, strict=True)), errors


def test_double_precision():
    experts = block(GatedMLP(bias=True), expert_type="delta", num_experts=80, expert_rank=4).experts.double()
    x, (weight, expert) = torch.randn(30, 16, dtype=torch.float64), route(30, 80, 2, dtype=torch.float64)
    wanted = loop(experts, stacks_of(experts), x, expert, weight)
    torch.testing.assert_close(experts(x, expert, weight), wanted)


def test_raises_when_the_rank_is_no_low_one():
    with pytest.raises(ValueError, match="expert_rank is 17, but a weight of the experts has a side of 16"):
        block(GatedMLP(), expert_type="delta", expert_rank=17)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant, form):
    made = block(GatedMLP(bias=True), expert_type="delta")
    x = torch.randn(2, 11, 16).requires_grad_()
    made(x).square().sum().backward()
    wanted = [value.grad.clone() for value in (x, *made.experts.parameters())]
    made.zero_grad()
    x.grad = None
    checkpoint(made, x, use_reentrant=use_reentrant).square().sum().backward()
    for value, one in zip((x, *made.experts.parameters()), wanted, strict=True):
        torch.testing.assert_close(value.grad, one)


def test_a_shared_expert_stands_beside_them():
    made = block(GatedMLP(), expert_type="delta", num_shared_experts=1)
    x = torch.randn(7, 16)
    _, weight, expert = made.router(x)
    routed = loop(made.experts, stacks_of(made.experts), x, expert, weight)
    wanted = routed + torch.sigmoid(made.shared_expert_gate(x)) * made.shared_expert(x)
    torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)


def test_they_compile_whole():
    made = block(GatedMLP(bias=True), expert_type="delta").eval()
    x = torch.randn(6, 16)
    with torch.no_grad():
        compiled = torch.compile(made.experts, fullgraph=True, backend="aot_eager")
        weight, expert = route(6, 5, 2)
        torch.testing.assert_close(compiled(x, expert, weight), made.experts(x, expert, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 4], ids=["each expert apart", "several at once"])
def test_nothing_of_the_paths_size_is_kept(rank, monkeypatch):
    """What backward waits for does not grow with the experts per token by more than the ranks, where they are more
    than a block.
    """
    monkeypatch.setattr(expert_paths, "BLOCK_BYTES", 32 * 512 * 4)
    sizes = {}
    for num_picked in (1, 4):
        moe = {"expert_type": "delta", "expert_rank": rank, "num_experts_per_tok": num_picked}
        experts = block(GatedMLP(16, 256), **moe).experts
        x, (weight, expert) = torch.randn(64, 16, requires_grad=True), route(64, 5, num_picked)
        weights = {value.untyped_storage().data_ptr() for value in experts.parameters()}
        stored = {}

        def keep(tensor, weights=weights, stored=stored):
            if (place := tensor.untyped_storage().data_ptr()) not in weights:
                stored[place] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            experts(x, expert, weight)
        sizes[num_picked] = sum(stored.values())
    assert sizes[4] < 1.2 * sizes[1]


def test_raises_when_delta_fields_are_given_to_full_experts():
    with pytest.raises(ValueError, match=r"text_moe.expert_rank is 4, but expert_type is 'full'"):
        sparse_config(text_moe={"num_experts": 4, "expert_rank": 4})


def test_raises_when_the_rank_is_not_positive():
    with pytest.raises(ValueError, match=r"vision_moe.expert_rank is 0; expected 1 or more"):
        sparse_config(vision_moe={"num_experts": 4, "expert_type": "delta", "expert_rank": 0})


@pytest.mark.parametrize("most_stacked", [0, 256], ids=["grouped", "as ever"])
def test_work_grows_at_most_linearly_with_the_experts(most_stacked, monkeypatch):
    """Operations, forward and backward. Grouped they are the same for any number; all experts' low-rank products at
    once are taken only while they are few.
    """
    monkeypatch.setattr(shared_base, "MOST_STACKED", most_stacked)
    counts = {}
    for num_experts in (4, 16, 64, 256):
        experts = block(GatedMLP(64, 96), expert_type="delta", num_experts=num_experts, expert_rank=4).experts
        x, (weight, expert) = torch.randn(32, 64, requires_grad=True), route(32, num_experts, 2)

        def step(experts=experts, x=x, weight=weight, expert=expert):
            experts(x, expert, weight).sum().backward()

        counts[num_experts] = count_operations(step)
    dense = 3 * 3 * 2 * 32 * 64 * 96
    assert counts[4] > dense
    assert counts[256] <= (1 if most_stacked == 0 else 1.1) * counts[4]
    assert max(counts.values()) <= (1 if most_stacked == 0 else 3) * counts[4]


@torch.no_grad()
def test_kernels_by_name_have_no_effect_on_them():
    model = sparse_model(text_moe={"num_experts": 4, "expert_type": "delta", "expert_rank": 3})
    wanted = model(**batch()).logits
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert gap(model(**batch()).logits, wanted) <= 1e-5  # ViT and connector have whole experts, which follow it


def test_a_copy_and_a_pickle_compute_the_same(tmp_path):
    experts = block(GatedMLP(bias=True), expert_type="delta").experts
    x, (weight, expert) = torch.randn(6, 16), route(6, 5, 2)
    torch.save(experts, tmp_path / "experts.pt")
    for other in (copy.deepcopy(experts), torch.load(tmp_path / "experts.pt", weights_only=False)):
        torch.testing.assert_close(other(x, expert, weight), experts(x, expert, weight))
