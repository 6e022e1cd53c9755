"""Rates of parts for the dense model: said, or refused where the dense model has one for two."""

import pytest

from modeling_vlmoe.finetune.control.rates import dense_groups

BOTH = {"experts", "mlp", "routers", "vision.mlp"}


@pytest.mark.parametrize(
    ("given", "trained", "wanted"),
    [
        ({"experts": 1e-4, "routers": 1e-3}, {"experts", "routers"}, {"mlp": 1e-4}),
        ({"experts": 1e-4, "mlp": 1e-4}, BOTH, {"mlp": 1e-4}),
        ({"text": 1e-4, "vision.experts": 1e-5}, BOTH, {"text": 1e-4, "vision.mlp": 1e-5}),
        ('{"experts": "1e-4"}', {"experts"}, {"mlp": 1e-4}),
    ],
)
def test_the_mlp_learns_as_its_experts(given, trained, wanted):
    assert dense_groups({"learning_rates": given}, (), trained, "Stage tune") == {"learning_rates": wanted}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlp": 1e-5, "experts": 1e-4}, "learning_rates 0.0001 for experts and 1e-05 for mlp"),
        ({"experts": 1e-4}, "learning_rates 0.0001 for experts and none for mlp"),
        ({"text": 1e-5, "experts": 1e-4}, "learning_rates 0.0001 for experts and 1e-05 for mlp"),
    ],
)
def test_raises_when_experts_and_mlps_learn_at_other_rates(given, message):
    settings = {"learning_rates": given}
    with pytest.raises(ValueError, match=f"{message}, but .*`control: {{learning_rates: {{mlp: ...}}}}`"):
        dense_groups(settings, (), BOTH, "Stage tune")
    assert dense_groups(settings, ["learning_rates"], BOTH, "Stage tune") == {}
