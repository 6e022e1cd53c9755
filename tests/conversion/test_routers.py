"""Every router after a real upcycling: exact where it promises so, else its gap is measured and written down."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import (
    CompressArguments,
    DensifyArguments,
    ExportArguments,
    UpcycleArguments,
    compress,
    densify,
    export,
    upcycle,
)
from modeling_vlmoe.conversion.upcycle import preview
from modeling_vlmoe.model_cards import render_card
from modeling_vlmoe.towers import sparse_blocks
from tests import hosts, models
from tests.conversion.sparse_checkpoints import save_vlmoe
from tests.models import EXPERTS, gap
from tests.routers import ROUTERS


def options_of(name):
    """A row of the table as settings of `vlmoe upcycle`."""
    row, given = ROUTERS[name], {}
    for part in row.parts:
        fields = dict(row.fields)
        given[f"{part}_experts"] = fields.pop("num_experts", 4)
        given[f"{part}_router"] = fields.pop("router_type", None)
        if fields:
            given[f"{part}_moe"] = fields
    return given


def receipt_of(folder):
    return json.loads((folder / "upcycle_receipt.json").read_text())


@torch.no_grad()
def logits(folder, num_images=(1, 1)):
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = models.batch(num_images)
    ids = inputs["input_ids"]
    inputs["input_ids"] = ids.masked_fill(ids == models.IMAGE_TOKEN, model.config.image_token_id)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.fixture(scope="module")
def dense(parents, tmp_path_factory):
    """The dense model of the same parents and seed."""
    given = {"text_model": str(parents / "llama"), "vision_model": str(parents / "siglip")}
    return upcycle(UpcycleArguments(**given, dense=True, output_dir=str(tmp_path_factory.mktemp("dense") / "model")))


@pytest.fixture(scope="module")
def made(parents, tmp_path_factory):
    """Gives the upcycled model of a router, each made once."""
    root, found = tmp_path_factory.mktemp("routers"), {}

    def make(name):
        if name not in found:
            given = {"text_model": str(parents / "llama"), "vision_model": str(parents / "siglip")}
            out = str(root / name.replace(" ", "_"))
            found[name] = upcycle(UpcycleArguments(**given, **options_of(name), output_dir=out))
        return found[name]

    return make


# The default run has one row of each kind; the others combine them.
COMBINED = ("sigmoid, expert bias", "raw sigmoid", "raw expert choice")
ROWS = [pytest.param(name, marks=pytest.mark.slow) if name in COMBINED else name for name in ROUTERS]


@pytest.mark.parametrize("name", ROWS)
def test_a_router_starts_as_it_promises(made, dense, name):
    out, row = made(name), ROUTERS[name]
    receipt, found = receipt_of(out), gap(logits(out), logits(dense))
    assert receipt["proof"]["largest_gap"] <= 1e-5
    if row.is_exact:
        assert found <= 1e-5
        assert "lossy" not in receipt["proof"]
        return
    lossy = receipt["proof"]["lossy"]
    assert {"image features", *(["text logits"] if "text" in row.parts else [])} <= set(lossy)
    if not row.fields.get("norm_topk_prob", True):  # experts that choose tokens may happen to choose each
        assert found > 1e-3
        assert lossy["image features"] > 1e-3
    assert "with routing weights that sum to one" in render_card(out)
    config = json.loads((out / "config.json").read_text())
    for part in row.parts:
        factors = config[f"{part}_moe"]["routed_scaling_factor"]
        assert receipt["settings"][f"{part}_moe"]["routed_scaling_factor"] == factors
        if row.fields.get("norm_topk_prob", True):
            assert factors == 1.0
        else:
            assert len(factors) == len(config[f"{part}_moe"].get("layers") or [0])
            assert all(factor > 0 and factor != 1 for factor in factors)


def test_tokens_that_no_expert_chooses_are_measured(arguments, dense):
    choice = {"vision_router": "expert_choice", "connector_router": "expert_choice"}
    asked = {
        "vision_experts": 3,
        "vision_top_k": 1,
        "connector_experts": 3,
        "connector_top_k": 1,
    }  # 9 places, 9 tokens
    out = upcycle(arguments(**choice, **asked))
    lossy = receipt_of(out)["proof"]["lossy"]
    assert lossy["image features"] > 1e-2
    assert gap(logits(out), logits(dense)) > 1e-3


@torch.no_grad()
def test_measured_scales_are_those_of_the_rows_that_layers_are_given(made, dense):
    """On what the dense model gives the layers, the raw weights sum to 1 in the mean, about: other tokens are sent."""
    model = AutoModelForImageTextToText.from_pretrained(made("raw")).eval()
    exact = AutoModelForImageTextToText.from_pretrained(made("softmax")).eval()
    sums, real = {}, dict(sparse_blocks(model))
    for path, block in sparse_blocks(exact):
        assert torch.equal(block.router.weight, real[path].router.weight)
        block.router.register_forward_hook(
            lambda _, args, out, path=path: sums.__setitem__(path, real[path].router(args[0])[1].sum(-1).mean())
        )
    inputs = models.batch((2, 2), num_text=60)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == models.IMAGE_TOKEN, model.config.image_token_id
    )
    exact(**inputs)
    assert len(sums) == len(real)
    assert all(0.8 < value < 1.25 for value in sums.values()), sums


def test_a_given_scale_is_kept(arguments):
    given = {"norm_topk_prob": False, "routed_scaling_factor": 2}
    out = upcycle(arguments(text_experts=4, text_moe=given))
    assert json.loads((out / "config.json").read_text())["text_moe"]["routed_scaling_factor"] == 2.0
    assert receipt_of(out)["proof"]["lossy"]["text logits"] > 1e-3


def test_experts_of_the_vit_may_differ_in_number(made, vlmoe_here, parents, tmp_path):
    out = made("per-layer experts")
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert [block.experts.num_experts for _, block in sparse_blocks(model)] == [2, 4]
    assert "2, 4 experts in layers 1, 2" in render_card(out)
    said = vlmoe_here(
        *("upcycle", "--text-model", parents / "llama", "--vision-model", parents / "siglip"),
        *("--vision-experts", "2,4", "--dry-run"),
    ).stdout
    assert "[2, 24]" in said
    assert "[4, 24]" in said
    for kind, args in (("compress", CompressArguments(rank=3)), ("densify", DensifyArguments())):
        args.checkpoint, args.output_dir = str(out), str(tmp_path / kind)
        out = {"compress": compress, "densify": densify}[kind](args)
        again = AutoModelForImageTextToText.from_pretrained(out)
        assert [block.experts.num_experts for _, block in sparse_blocks(again)] == [2, 4]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sigmoid, expert bias", marks=pytest.mark.slow),
        pytest.param("raw", marks=pytest.mark.slow),
        "expert choice",
    ],
)
def test_routers_stay_when_experts_are_rewritten(made, tmp_path, name):
    small = compress(CompressArguments(checkpoint=str(made(name)), rank=3, output_dir=str(tmp_path / "small")))
    assert gap(logits(small), logits(made(name))) <= 1e-5  # copies need no pairs
    whole = densify(DensifyArguments(checkpoint=str(small), output_dir=str(tmp_path / "whole")))
    assert gap(logits(whole), logits(made(name))) <= 1e-5
    configs = [json.loads((folder / "config.json").read_text()) for folder in (made(name), whole)]
    for part in ROUTERS[name].parts:
        for field in ("router_type", "routed_scaling_factor", "use_expert_bias", "router_logit_norm"):
            assert configs[0][f"{part}_moe"][field] == configs[1][f"{part}_moe"][field]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "sigmoid"}, "router_type is 'sigmoid'"),
        ({"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0"),
        ({"use_expert_bias": True}, "use_expert_bias is True"),
        ({"router_logit_norm": 1.0}, "router_logit_norm is 1.0"),
        ({"modality_routing": "isolated"}, "modality_routing is 'isolated'"),
    ],
)
def test_raises_when_a_native_family_lacks_the_router(tmp_path, fields, message):
    checkpoint = save_vlmoe(tmp_path / "model", "qwen3", text_moe=fields)
    with pytest.raises(ValueError, match=f"qwen3_moe lacks: {message}"):
        export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"router_type": "expert_choice"}, "choose tokens"), ({"routed_scaling_factor": 2.0}, "weights that are multi")],
)
def test_raises_when_experts_of_the_vit_cannot_become_dense(tmp_path, fields, message):
    checkpoint = save_vlmoe(tmp_path / "model", "qwen3", vision_moe=EXPERTS | fields)
    with pytest.raises(ValueError, match=message):
        export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_experts": 4, "text_router": "expert_choice"}, "text_moe.router_type is 'expert_choice'"),
        ({"text_experts": 4, "text_router": "hash"}, "router_type"),
        ({"text_experts": 4, "text_moe": {"router_type_": 1}}, "text_moe has unknown fields"),
        ({"vision_experts": "2,4,8"}, "vision_moe.num_experts is"),
        ({"text_experts": 4, "text_moe": "norm_topk_prob: false", "format": "native"}, "--format native"),
    ],
)
def test_raises_when_an_upcycling_cannot_route_so(arguments, settings, message, leaves_nothing):
    with leaves_nothing(), pytest.raises(ValueError, match=message):
        upcycle(arguments(**settings))


def test_a_preview_says_what_routing_changes(arguments):
    assert "the routing of vision_moe changes" in preview(arguments(vision_experts=4, vision_router="expert_choice"))
    assert "changes what" not in preview(arguments(vision_experts=4, vision_router="sigmoid"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_a_host_in_place_takes_the_routers(tmp_path, family):
    parent = hosts.save(tmp_path / "dense", family)
    asked = {"text_experts": 4, "text_router": "sigmoid", "vision_experts": 4, "vision_router": "expert_choice"}
    args = UpcycleArguments(vlm_model=str(parent), output_dir=str(tmp_path / "out"), **asked)
    receipt = receipt_of(upcycle(args))
    assert receipt["proof"]["largest_gap"] <= 1e-5
    assert receipt["proof"]["lossy"]
