import math

import pytest
import torch

from modeling_vlmoe.conversion.connector_init import DrawnConnector
from modeling_vlmoe.conversion.router_init import uniform
from modeling_vlmoe.conversion.seeding import tensor_generator


@pytest.mark.parametrize("width", [64, 4096])
def test_uniform_routers_give_logits_of_one_spread_at_any_width(width):
    weight = uniform(64, width, tensor_generator(0, "router"))
    assert weight.var().item() == pytest.approx(1 / (3 * width), rel=0.1)
    tokens = torch.randn(200, width, generator=tensor_generator(0, "tokens"))
    assert (tokens @ weight.T).std().item() == pytest.approx(math.sqrt(1 / 3), rel=0.1)


def test_what_is_drawn_depends_on_seed_and_name_only():
    def draw(seed, name):
        return torch.rand(4, generator=tensor_generator(seed, name))

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))


def test_a_drawn_connector_is_normal_with_zero_bias():
    connector = DrawnConnector(
        {"linear_1.weight": (300, 200), "linear_1.bias": (300,)}, seed=0, std=0.02, dtype=torch.bfloat16
    )
    assert connector.names == ["linear_1.weight", "linear_1.bias"]
    weight = connector.tensor("linear_1.weight")
    assert weight.dtype == torch.bfloat16
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert connector.tensor("linear_1.bias").eq(0).all()
