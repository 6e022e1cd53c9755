"""What a step costs is counted whatever computes it."""

import pytest
import torch
from torch import nn
from transformers.integrations import moe

from modeling_vlmoe.finetune.control.flops import count_pass
from tests import models

ROWS, WIDTH, COLUMNS = 7, 5, 3


def inputs():
    batch = models.batch()
    return batch | {"labels": batch["input_ids"].clone()}


class Product(nn.Module):
    """One product of matrices, and a loss."""

    def __init__(self, learns_input):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, COLUMNS))
        self.before = nn.Parameter(torch.randn(ROWS, WIDTH), requires_grad=learns_input)

    def forward(self):
        return type("Output", (), {"loss": (self.before @ self.weight).square().sum()})


@pytest.mark.parametrize(("learns_input", "passes"), [(False, 2), (True, 3)])
def test_a_product_costs_two_operations_and_a_frozen_side_no_gradient(learns_input, passes):
    assert count_pass(Product(learns_input), {}) == passes * 2 * ROWS * WIDTH * COLUMNS


@pytest.mark.parametrize("has_kernel", [True, False])
def test_experts_cost_the_same_by_every_kernel(has_kernel, monkeypatch):
    """`eager` leaves out the rows of padding, which are no more than one in a hundred here."""
    if not has_kernel:
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    found = {}
    for kernel in ("eager", "batched_mm", "grouped_mm"):
        model = models.sparse_model()
        model.set_experts_implementation(kernel)
        found[kernel] = count_pass(model, inputs())
    assert found["grouped_mm"] == found["batched_mm"]
    assert found["eager"] == pytest.approx(found["grouped_mm"], rel=0.01)


def test_top_2_costs_more_than_dense():
    dense = models.sparse_model(text_moe=None, vision_moe=None, connector_moe=None)
    assert count_pass(models.sparse_model(), inputs()) > 1.2 * count_pass(dense, inputs())
