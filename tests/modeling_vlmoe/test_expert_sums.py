"""Sums over paths, and stacks of matrices in another layout."""

import pytest
import torch

from modeling_vlmoe.expert_paths import Paths
from modeling_vlmoe.expert_sums import OuterSums, widened
from modeling_vlmoe.stack_layout import SLICE_NUMBERS, cast_stack, laid_as, laid_out

DTYPES = [torch.float32, torch.bfloat16]


def test_two_numbers_are_added_in_their_own_dtype():
    """They are rounded once either way; of three the sum of two would be rounded too."""
    assert [widened(torch.bfloat16, number) for number in (1, 2, 3)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert widened(torch.float32, 2) == widened(torch.float32, 8) == torch.float32
    one, other = torch.randn(2, 10_000).bfloat16()
    assert torch.equal(one + other, (one.float() + other.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("most_rows", [32, 64, 4096])
@pytest.mark.parametrize("are_joined", [False, True], ids=["apart", "joined"])
def test_each_expert_has_the_sum_over_its_paths(dtype, most_rows, are_joined):
    """Cut or not, several in a group, first and last of a group, and zero for those without paths."""
    torch.manual_seed(0)
    expert = torch.tensor([1, 1, 3, 4, 4, 4, 4, 6])[torch.randint(8, (150, 1))]  # 0, 2, 5 and 7 have none
    groups = Paths(expert, 8).groups(dtype, most_rows, are_joined)
    left, right = torch.randn(150, 16).to(dtype), torch.randn(150, 8).to(dtype)
    sums = OuterSums(torch.full((8, 16, 8), torch.nan, dtype=dtype), groups)
    for group in groups:
        sums.add(group, group.zero_repeats(left[group.paths]), right[group.paths])
    found = sums.result()
    assert found.dtype == dtype
    for number in range(8):
        mine = (expert == number)[:, 0]
        wanted = left[mine].double().T @ right[mine].double()
        assert (found[number].double() - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 0.02) * 30


@pytest.mark.parametrize("num_experts", [4, 40])
@pytest.mark.parametrize("num_rows", [24, SLICE_NUMBERS // 40])
def test_a_stack_is_cast_and_laid_out_as_in_two_steps(num_experts, num_rows):
    """PEFT's layout to ours and back, whole or in slices; the gradient lies as what it is the gradient of."""
    torch.manual_seed(0)
    stored = torch.randn(num_rows, 3, num_experts, requires_grad=True)
    stack = stored.movedim(-1, 0)
    wanted = stack.to(torch.bfloat16)
    gradient = torch.randn(stack.shape).bfloat16()
    (of_wanted,) = torch.autograd.grad(wanted, stored, gradient)
    made = cast_stack(stack, torch.bfloat16)
    (of_made,) = torch.autograd.grad(made, stored, gradient)
    assert made.is_contiguous()
    assert torch.equal(made, wanted)
    assert of_made.dtype == torch.float32
    assert of_made.is_contiguous()
    assert torch.equal(of_made, of_wanted)


@pytest.mark.parametrize("num_experts", [4, 40])
def test_a_layout_there_and_back(num_experts):
    stack = torch.randn(SLICE_NUMBERS // 40, 3, num_experts).movedim(-1, 0)
    laid = laid_out(stack)
    assert laid.is_contiguous()
    assert torch.equal(laid, stack)
    back = laid_as(laid, stack)
    assert back.stride() == stack.stride()
    assert torch.equal(back, stack)


def test_a_cast_keeps_nothing_of_the_stack():
    """So that what was cast may be trained between a forward and its backward, as by PEFT's own path."""
    stored = torch.randn(4, 3, 2, requires_grad=True)
    made = cast_stack(stored.movedim(-1, 0), torch.bfloat16)
    with torch.no_grad():
        stored.mul_(2)
    made.sum().backward()
    assert torch.equal(stored.grad, torch.ones(4, 3, 2))


def test_a_stack_of_the_dtype_asked_for_is_itself():
    stack = torch.randn(2, 3, 4)
    assert cast_stack(stack, torch.float32) is stack
