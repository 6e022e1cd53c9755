"""What the sweep makes of a VLM's answer to an image: right experts pass; wrong and bypassed ones are found."""

import pytest
import torch

from modeling_vlmoe.conversion.backbones import tiny_vlms, vlm_inputs
from modeling_vlmoe.conversion.backbones.measuring import measure
from modeling_vlmoe.conversion.backbones.measuring_vlms import convert
from modeling_vlmoe.conversion.backbones.vlm_runs import check_effects, judge_logits, run_image
from modeling_vlmoe.conversion.gaps import LIMIT, Findings, ProofError
from modeling_vlmoe.mlp_layouts import run_dense
from modeling_vlmoe.parts import blocks_of

FAMILY = "internvl"  # experts in all three parts


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    dense = tiny_vlms.build_vlm(FAMILY)
    plan, _, sparse = convert(dense, tmp_path_factory.mktemp("internvl"))
    return dense, plan, sparse, run_image(FAMILY, dense)


def test_experts_give_the_dense_logits_of_an_image_and_each_of_them_matters(converted):
    dense, plan, sparse, run = converted
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    assert judge_logits(Findings(), run, dense, sparse).gap <= LIMIT
    check_effects(run, sparse, plan.mlps)
    torch.testing.assert_close(sparse.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_raises_when_a_part_is_wrong_behind_an_image(converted, part):
    dense, _, sparse, run = converted
    _, block = blocks_of(sparse, [part])[-1]
    bias = block.experts.down_proj_bias.data
    bias += 0.1
    try:
        with pytest.raises(ProofError, match="logits of an image and text differs by"):
            judge_logits(Findings(), run, dense, sparse)
    finally:
        bias -= 0.1


@pytest.mark.parametrize("part", ["text", "vision", "connector"])
def test_raises_when_experts_are_bypassed(converted, part, monkeypatch):
    dense, plan, sparse, run = converted
    path, block = blocks_of(sparse, [part])[-1]
    layout = plan.mlps[path].layout
    mlp = dense.get_submodule(layout.source_path(path))
    monkeypatch.setattr(block, "forward", lambda hidden_states: run_dense(mlp, layout, hidden_states))
    assert judge_logits(Findings(), run, dense, sparse).gap <= LIMIT
    with pytest.raises(ValueError, match=f"do not depend on the experts of {path}: they are bypassed"):
        check_effects(run, sparse, plan.mlps)


def test_raises_when_no_form_of_an_image_is_a_familys():
    with pytest.raises(ValueError, match="images in no known form; expected the arguments of one of these: packed"):
        vlm_inputs.image_form("no-vlm", torch.nn.Linear)


def test_raises_when_the_features_of_an_image_are_not_as_wide_as_the_llm(monkeypatch):
    monkeypatch.delitem(tiny_vlms.ROOT_FIELDS, "paligemma")
    with pytest.raises(ValueError, match=r"are \[2048\] wide, the LLM 32: the configuration of this paligemma"):
        run_image("paligemma", tiny_vlms.build_vlm("paligemma"))


def test_raises_when_a_dense_vlm_does_not_see_the_image(converted, monkeypatch):
    dense, *_ = converted
    inputs = vlm_inputs.image_and_text(dense, vlm_inputs.image_form(FAMILY, type(dense)))
    blind = torch.zeros_like(inputs["pixel_values"])
    monkeypatch.setattr(
        "modeling_vlmoe.conversion.backbones.vlm_runs.image_and_text",
        lambda *_: inputs | {"pixel_values": blind},
    )
    with pytest.raises(ValueError, match="its logits do not depend on an image given as pixels"):
        run_image(FAMILY, dense)


def test_a_family_that_takes_no_known_image_is_said_to_have_been_given_none(monkeypatch):
    monkeypatch.setattr(vlm_inputs, "IMAGE_FORMS", ())
    found = measure(FAMILY, "vlm")
    assert (found.kind, found.reads, found.image_gap) == ("converted", "", None)
    assert found.reason.startswith("images not run: InternVLForConditionalGeneration takes ")
