"""A control of equal cost is kept where the same command comes again."""

import pytest

from modeling_vlmoe.finetune.chain import run as chain_run
from modeling_vlmoe.finetune.chain.recipe import parse_chain
from modeling_vlmoe.finetune.control.arms import build_pairs
from modeling_vlmoe.finetune.control.run import run_pair
from modeling_vlmoe.finetune.control.settings import ControlSettings
from tests.finetune.chain import chains

STAGES = {"upcycle": {"upcycle": {"text_experts": 4}}, "tune": {"method": "full", "train": ["experts"]}}


@pytest.fixture
def make_pair(parents, data, tmp_path):
    text, vision = map(str, parents)
    given = {"text_model": text, "vision_model": vision, "data": str(data), "eval_data": str(data), "max_steps": 1}
    values = chains.SHARED | {"save_steps": 100} | given | {"output_dir": str(tmp_path / "out")}
    values.pop("lora_r")
    control = ControlSettings(with_dense_control=True, control_match="flops")

    def make():
        (pair,) = build_pairs(parse_chain(values | {"stages": STAGES}, {}, "Recipe mine"), control)
        return pair, control

    return make


@pytest.mark.slow
def test_a_control_of_equal_cost_is_kept(make_pair, tmp_path, monkeypatch):
    """Its head is made first, as its step has to be counted, and what was trained behind the head stays."""
    pair, counts = run_pair(*make_pair(), tmp_path / "out/control", None)
    folder = tmp_path / "out/control/dense-42"
    before = chains.results(folder)
    assert chains.read(folder)["result"] == "2-tune"
    monkeypatch.setattr(chain_run, "finetune", None)
    monkeypatch.setattr(chain_run, "upcycle", None)
    assert run_pair(*make_pair(), tmp_path / "out/control", None) == (pair, counts)
    chains.assert_same(chains.results(folder), before)
