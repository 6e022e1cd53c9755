"""`vlmoe convert-routing`: what it writes is routed otherwise, exactly where it can be, else by a measured gap."""

import itertools
import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import (
    ConvertRoutingArguments,
    ProofError,
    UpcycleArguments,
    convert_routing,
    operations,
    routing_plan,
    upcycle,
)
from modeling_vlmoe.conversion.rewriting import REWRITE_RECEIPT_NAME, preview_rewrite
from modeling_vlmoe.finetune import lora_config
from modeling_vlmoe.modality_routing import open_to
from modeling_vlmoe.model_cards import render_card
from modeling_vlmoe.towers import sparse_blocks
from tests import hosts, models, tiny
from tests.conversion.sparse_checkpoints import IMAGE_TOKEN, save_hosted, save_vlmoe
from tests.conversion.test_rewriting import logits
from tests.models import gap

SIX = {"num_experts": 6, "num_experts_per_tok": 2}
KINDS = {
    "shared": None,
    "per_modality_balance": None,
    "intra_inter": [1, 2, 3],
    "isolated": [2, 4, 0],
}
QUICK = [("shared", "intra_inter"), ("isolated", "shared")]
PAIRS = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in itertools.permutations(KINDS, 2)
]
UNLIKE = [("shared", "isolated"), pytest.param("shared", "per_modality_balance", marks=pytest.mark.slow)]
ROUTER = "model.language_model.layers.1.mlp.router"
LIMIT = 1e-5


def fields(kind):
    return SIX | {"modality_routing": kind} | ({"modality_experts": pools} if (pools := KINDS[kind]) else {})


def receipt(folder):
    return json.loads((folder / REWRITE_RECEIPT_NAME).read_text())


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@torch.no_grad()
def with_copies(folder):
    """The same checkpoint with experts that are copies of one another."""
    model = load(folder)
    for _, block in sparse_blocks(model):
        for value in block.experts.parameters():
            value.copy_(value[:1].expand_as(value))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a kind, whose experts are copies or unlike; made once."""
    made = {}

    def get(kind, are_copies=False):
        key = (kind, are_copies)
        if key not in made:
            folder = save_vlmoe(tmp_path_factory.mktemp(kind) / f"model-{kind}", text_moe=fields(kind))
            made[key] = with_copies(folder) if are_copies else folder
        return made[key]

    return get


def convert(source, kind, out, **options):
    options = {"modality_experts": KINDS[kind]} | options
    return convert_routing(ConvertRoutingArguments(str(source), to=kind, output_dir=out, **options))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_copies_are_converted_exactly(saved, before, after, tmp_path):
    source = saved(before, are_copies=True)
    out = convert(source, after, tmp_path / "out")
    moe = load(out).config.text_moe
    assert (moe.modality_routing, moe.modality_experts) == (after, KINDS[after])
    assert gap(logits(out), logits(source)) <= LIMIT
    written = receipt(out)
    assert written["proof"]["largest_gap"] <= LIMIT
    assert written["routing"]["why_exact"]
    assert written["routing"]["from"]["modality_routing"] == before


@pytest.mark.parametrize(("before", "after"), UNLIKE)
def test_experts_that_differ_are_converted_by_a_measured_gap(saved, before, after, tmp_path):
    source = saved(before)
    out = convert(source, after, tmp_path / "out")
    written = receipt(out)
    is_same = {before, after} == {"shared", "per_modality_balance"}
    assert ("proof" in written) == is_same
    found = gap(logits(out), logits(source))
    assert (found <= LIMIT) == is_same
    if not is_same:
        assert written["gaps"]["informative"]["logits"] > 1e-3
        assert written["gaps"]["informative"]["image features"] == 0


def test_one_router_becomes_two_and_comes_back(saved, tmp_path):
    source = saved("shared")
    two = convert(source, "intra_inter", tmp_path / "two")
    old = load(source).state_dict()
    state = load(two).state_dict()
    assert torch.equal(state[f"{ROUTER}.image_weight"], old[f"{ROUTER}.weight"])
    assert torch.equal(state[f"{ROUTER}.weight"], old[f"{ROUTER}.weight"])
    again = load(convert(two, "shared", tmp_path / "again")).state_dict()
    assert again.keys() == old.keys()
    assert all(torch.equal(again[name], value) for name, value in old.items())


def test_two_routers_that_no_expert_is_closed_to_are_the_one_that_they_were_made_of(saved, tmp_path):
    """Exact for any experts: (0, 0, all) closes none."""
    source = saved("shared")
    out = convert(source, "intra_inter", tmp_path / "out", modality_experts=[0, 0, 6])
    assert receipt(out)["routing"]["why_exact"] == routing_plan.SAME
    assert gap(logits(out), logits(source)) <= LIMIT


@pytest.mark.parametrize(("after", "pools"), [("shared", None), ("isolated", [4, 2, 0])])
def test_an_expert_keeps_the_row_by_which_it_was_chosen(saved, after, pools, tmp_path):
    source = saved("intra_inter")
    old = load(source).state_dict()
    images, text = old[f"{ROUTER}.image_weight"], old[f"{ROUTER}.weight"]
    written = load(convert(source, after, tmp_path / "out", modality_experts=pools)).state_dict()
    assert f"{ROUTER}.image_weight" not in written
    wanted = [images[0], text[1], text[2]]  # of images: 0; of text: 1, 2; of both: 3, 4, 5
    for expert in (3, 4, 5):
        own = images if pools and expert < pools[0] else text
        wanted.append(own[expert] if pools else (images[expert] + text[expert]) / 2)
    torch.testing.assert_close(written[f"{ROUTER}.weight"], torch.stack(wanted), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_pools_that_stay_are_converted_exactly(tmp_path):
    """Two routers over pools without a shared expert are one router over the same pools."""
    source = save_vlmoe(tmp_path / "model", text_moe=fields("intra_inter") | {"modality_experts": [2, 4, 0]})
    out = convert(source, "isolated", tmp_path / "out")
    assert receipt(out)["routing"]["why_exact"] == routing_plan.SAME
    assert gap(logits(out), logits(source)) <= LIMIT


@pytest.mark.slow
def test_a_router_that_no_expert_keeps_is_dropped_by_name(tmp_path):
    """Images had shared experts alone, which are all of text afterwards."""
    source = save_vlmoe(tmp_path / "model", text_moe=fields("intra_inter") | {"modality_experts": [0, 3, 3]})
    out = convert(source, "isolated", tmp_path / "out", modality_experts=[3, 3, 0])
    dropped = receipt(out)["mapping"]["dropped_tensors"]["vlm"]
    assert dropped == [f"{ROUTER.replace('1', str(layer))}.image_weight" for layer in range(3)]
    old, new = load(source).state_dict(), load(out).state_dict()
    assert torch.equal(new[f"{ROUTER}.weight"], old[f"{ROUTER}.weight"])


def test_no_image_token_reaches_a_closed_expert_afterwards(saved, tmp_path):
    model = load(convert(saved("shared"), "isolated", tmp_path / "out"))
    inputs = models.batch((1, 2))
    is_image = (inputs["input_ids"] == models.IMAGE_TOKEN).reshape(-1)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == models.IMAGE_TOKEN, IMAGE_TOKEN)
    with torch.no_grad():
        for found in model(**inputs, output_router_logits=True).router_logits:
            closed = [one for one in range(6) if one not in open_to(model.config.text_moe, "image")]
            assert (found[is_image][:, closed] == torch.finfo(torch.float32).min).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["delta", "trained delta"])
def test_delta_experts_are_copies_until_they_are_trained(kind, tmp_path):
    source = save_vlmoe(tmp_path / "model", text_moe=SIX | {"expert_type": "delta", "expert_rank": 2})
    if kind == "delta":
        model = load(source)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith("_b") or "_bias" in name:
                    value.zero_()
        model.save_pretrained(source)
    out = convert(source, "isolated", tmp_path / "out")
    assert (receipt(out)["routing"]["why_exact"] == routing_plan.COPIES) == (kind == "delta")
    assert (gap(logits(out), logits(source)) <= LIMIT) == (kind == "delta")


@pytest.mark.slow
def test_copies_without_renormalisation_are_measured(tmp_path):
    source = with_copies(save_vlmoe(tmp_path / "model", text_moe=SIX | {"norm_topk_prob": False}))
    out = convert(source, "isolated", tmp_path / "out")
    assert receipt(out)["routing"]["why_exact"] is None
    assert receipt(out)["gaps"]["informative"]["logits"] > 1e-3


def test_half_precision_and_files_beside_the_weights_stay(tmp_path):
    source = save_vlmoe(tmp_path / "model", text_moe=fields("intra_inter"), dtype=torch.bfloat16)
    for name in ("upcycle_receipt.json", "training_history.json"):
        (source / name).write_text("{}" if name.startswith("up") else "[]")
    out = convert(source, "shared", tmp_path / "out")
    state = AutoModelForImageTextToText.from_pretrained(out, dtype="auto").state_dict()
    assert {value.dtype for name, value in state.items() if "router" in name} == {torch.float32}
    assert {value.dtype for name, value in state.items() if "router" not in name} == {torch.bfloat16}
    assert (out / "upcycle_receipt.json").read_text() == "{}"
    assert (out / "training_history.json").is_file()
    assert "its LLM routed otherwise by modality (`vlmoe convert-routing`)" in render_card(out)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("smolvlm", marks=pytest.mark.slow)])
def test_a_vlm_in_place_is_converted(family, tmp_path):
    source = with_copies(save_hosted(tmp_path / "model", family, moe=SIX))
    inputs = hosts.inputs(hosts.processor(family), family, (2,))
    with torch.no_grad():
        wanted = load(source)(**inputs).logits
        out = convert(source, "intra_inter", tmp_path / "out")
        assert gap(load(out)(**inputs).logits, wanted) <= LIMIT
    assert receipt(out)["proof"]["largest_gap"] <= LIMIT
    other = save_hosted(tmp_path / "unlike", family, moe=SIX)
    out = convert(other, "isolated", tmp_path / "pools")
    assert receipt(out)["gaps"]["informative"]["logits of a picture and text"] > 1e-3


# Upcycling


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parents")
    tiny.save_text_parent(folder / "llama", "llama")
    tiny.save_vision_parent(folder / "siglip", "siglip")
    return {"text_model": str(folder / "llama"), "vision_model": str(folder / "siglip")}


@pytest.mark.parametrize(
    "kind",
    ["intra_inter", *(pytest.param(one, marks=pytest.mark.slow) for one in ("per_modality_balance", "isolated"))],
)
def test_dense_parents_become_experts_that_are_routed_by_modality(kind, parents, tmp_path):
    """Proved on text, and in every layer on rows passed off as of images and of text."""
    asked = {"modality_routing": kind} | ({"modality_experts": pools} if (pools := KINDS[kind]) else {})
    out = upcycle(UpcycleArguments(**parents, output_dir=str(tmp_path / "out"), text_experts=6, text_moe=asked))
    written = json.loads((out / "upcycle_receipt.json").read_text())
    assert written["proof"]["largest_gap"] <= LIMIT
    assert written["settings"]["text_moe"] | asked == written["settings"]["text_moe"]
    assert written["mapping"]["new"]["router"] == (6 if kind == "intra_inter" else 3)
    state = load(out).state_dict()
    routers = [value for name, value in state.items() if ".router." in name]
    assert all(not torch.equal(*pair) for pair in itertools.combinations(routers, 2))  # each drawn by its own name
    bound = routers[0].shape[1] ** -0.5
    assert all(0.8 * bound < value.abs().max() <= bound for value in routers)
    card = (out / "README.md").read_text()
    of = "`intra_inter`: 1 of images, 2 of text, 3 of both" if kind == "intra_inter" else f"`{kind}`"
    assert f"top-2, routed by modality ({of}" in card


@pytest.mark.slow
def test_a_dense_vlm_becomes_one_that_is_routed_by_modality(tmp_path):
    dense = hosts.save(tmp_path / "dense", "qwen2_5_vl")
    asked = {"modality_routing": "isolated"}
    args = UpcycleArguments(vlm_model=str(dense), output_dir=str(tmp_path / "out"), text_experts=6, text_moe=asked)
    written = json.loads((upcycle(args) / "upcycle_receipt.json").read_text())
    assert written["proof"]["largest_gap"] <= LIMIT


def test_a_wrong_expert_of_images_is_no_checkpoint(parents, tmp_path, monkeypatch):
    """No text token would show it."""
    right = operations.OPERATIONS["experts"]

    def wrong(assignment, drawing):
        blocks = list(right(assignment, drawing))
        yield from [2 * blocks[0], *blocks[1:]]

    monkeypatch.setitem(operations.OPERATIONS, "experts", wrong)
    asked = {"modality_routing": "isolated", "modality_experts": [2, 4, 0]}
    with pytest.raises(ProofError, match="not its dense parents"):
        upcycle(UpcycleArguments(**parents, output_dir=str(tmp_path / "out"), text_experts=6, text_moe=asked))


# Refusals


def test_a_wrong_router_is_no_checkpoint(saved, tmp_path, monkeypatch):
    right = operations.OPERATIONS["rows"]

    def wrong(assignment, drawing):
        yield from (-block for block in right(assignment, drawing))

    source = save_vlmoe(tmp_path / "model", text_moe=fields("intra_inter") | {"modality_experts": [2, 4, 0]})
    monkeypatch.setitem(operations.OPERATIONS, "rows", wrong)
    with pytest.raises(ProofError, match="routed otherwise is not the checkpoint, though it should be"):
        convert(source, "isolated", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("shared", {}, "is routed so already"),
        ("isolated", {"modality_experts": [1, 5, 0]}, "fewer experts than num_experts_per_tok"),
        ("isolated", {"modality_experts": [2, 2, 2]}, "no expert is of both"),
        ("intra_inter", {"modality_experts": [2, 2, 4]}, "add up to num_experts"),
        ("per_modality_balance", {"modality_experts": [2, 2, 2]}, "opens every expert to every token; leave it out"),
    ],
)
def test_raises_when_it_cannot_be_routed_so(saved, kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(saved("shared"), kind, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_raises_when_there_is_nothing_to_convert(saved, tmp_path):
    source = str(saved("shared"))
    with pytest.raises(ValueError, match="Give --to, how the LLM"):
        convert_routing(ConvertRoutingArguments(source, output_dir=tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--to is 'pools'; expected one of shared"):
        ConvertRoutingArguments(source, to="pools")
    with pytest.raises(ValueError, match="Name the checkpoint: vlmoe convert-routing CHECKPOINT"):
        convert_routing(ConvertRoutingArguments(to="shared", output_dir=tmp_path / "out"))
    vision = models.sparse_model(text_moe=None, image_token_id=IMAGE_TOKEN)
    vision.save_pretrained(tmp_path / "vision")
    models.processor().save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"The LLM of .* is dense, so there is nothing to route"):
        convert(tmp_path / "vision", "isolated", tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty"):
        convert(source, "isolated", tmp_path / "vision")


def test_raises_when_it_is_an_adapter(saved, tmp_path):
    adapted = load(saved("shared"))
    get_peft_model(adapted, lora_config(adapted, lora_r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter is an adapter.*Merge it first \(modeling_vlmoe.finetune.merge"):
        convert(tmp_path / "adapter", "isolated", tmp_path / "out")


# The command


def run(*words):
    from typer.testing import CliRunner

    from modeling_vlmoe.cli import app

    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output


def test_the_command_says_what_it_did(saved, tmp_path):
    words = ["convert-routing", saved("shared"), "--to", "intra_inter", "--modality-experts", 2, 2, 2]
    said = run(*words, "--output-dir", tmp_path / "out")
    assert "routing of the LLM: shared -> intra_inter [2, 2, 2]; both routers are the old one" in said
    assert "another model: its experts differ" in said
    assert "logits: " in said
    assert f"receipt: {REWRITE_RECEIPT_NAME}" in said
    said = run("convert-routing", tmp_path / "out", "--to", "shared", "--dry-run")
    assert "rows    3 x model.language_model.layers.*.mlp.router.weight [6, 32] float32" in said
    assert "computes the same" not in said
    args = ConvertRoutingArguments(str(saved("shared")), to="per_modality_balance")
    assert f"computes the same: {routing_plan.SAME}" in preview_rewrite("convert-routing", args)
    said = run("convert-routing", saved("shared"), "--to", "isolated", "--output-dir", tmp_path / "out", "--force")
    assert load(tmp_path / "out").config.text_moe.modality_experts == [3, 3, 0]
