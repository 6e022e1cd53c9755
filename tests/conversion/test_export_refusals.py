"""What cannot be exported without loss is refused by name, with what can be had instead."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from modeling_vlmoe.conversion import ExportArguments, UpcycleArguments, export, upcycle
from modeling_vlmoe.conversion.export import EXPORT_RECEIPT_NAME
from modeling_vlmoe.conversion.streaming import CheckpointReader
from tests.conversion.sparse_checkpoints import EXPERTS, inputs, save_vlmoe
from tests.models import gap

LIMIT = 1e-5


def exported(checkpoint, out, **settings):
    return export(ExportArguments(checkpoint=str(checkpoint), output_dir=str(out), **settings))


def receipt_of(folder):
    return json.loads((folder / EXPORT_RECEIPT_NAME).read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Qwen3 with unlike experts, to be read only."""
    return save_vlmoe(tmp_path_factory.mktemp("export") / "vlmoe", "qwen3", "clip", [0, 2])


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("phi3", {}, "The LLM is a phi3 model, and transformers has no sparse LM with its layers"),
        (
            "llama",
            {"text": {"attention_bias": True}},
            r"mixtral lacks: attention_bias is True .*; qwen2_moe lacks: ",
        ),
        (
            "llama",
            {"text": {"head_dim": 16}, "text_moe": {"norm_topk_prob": False}},
            r"mixtral lacks: norm_topk_prob is False .*; qwen2_moe lacks: head_dim is 16",
        ),
        ("mistral", {"text_moe": {"norm_topk_prob": False}}, r"mixtral lacks: norm_topk_prob is False"),
        ("mistral", {"text_moe": {"num_shared_experts": 1}}, r"mixtral lacks: a shared expert"),
        ("qwen3", {"text_moe": {"num_shared_experts": 1}}, r"qwen3_moe lacks: a shared expert"),
        (
            "mistral",
            {"layers": [0], "text_moe": {"moe_intermediate_size": 16}},
            r"dense layers \[1, 2\] of width 48, and experts of width 16",
        ),
        (
            "qwen3",
            {"text": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}},
            r"qwen3_moe lacks: sliding-window attention of 8 tokens in layers \[1, 2\]",
        ),
        ("llama", {"text": {"logit_scale": 0.5}}, r"logit_scale is 0.5 \(maths of the head\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["llava", "text"])
def test_raises_when_the_llm_cannot_be_carried(tmp_path, family, settings, message, to):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", family, **settings)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        exported(checkpoint, tmp_path / "out", to=to)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("vision_moe", r"layers \[1, 2\] of the ViT \(4 experts, top-2\)"),
        ("connector_moe", r"the connector \(4 experts, top-2\)"),
    ],
)
def test_raises_when_experts_of_image_parts_are_unlike(tmp_path, part, named, leaves_nothing):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", **{part: EXPERTS})
    with (
        leaves_nothing(),
        pytest.raises(ValueError, match=rf"those of {named} are no longer .*--to text.* away"),
    ):
        exported(checkpoint, tmp_path / "out")
    assert receipt_of(exported(checkpoint, tmp_path / "text", to="text"))["is_exact"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"moe_intermediate_size": 16}, "are not as wide as the dense MLP"),
        ({"num_shared_experts": 1}, "have a shared expert beside them"),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["vision_moe", "connector_moe"])
def test_raises_when_there_is_no_mean_either(tmp_path, part, fields, reason, leaves_nothing):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", **{part: EXPERTS | fields})
    for mean_experts in (False, True):
        with leaves_nothing(), pytest.raises(ValueError, match=f"{reason}.*There is no mean"):
            exported(checkpoint, tmp_path / "out", mean_experts=mean_experts)


def test_raises_when_copies_are_weighted_otherwise(parents, tmp_path):
    copies = {"text_model": str(parents / "llama"), "vision_model": str(parents / "siglip"), "connector_experts": 2}
    model = upcycle(UpcycleArguments(**copies, output_dir=str(tmp_path / "vlmoe")))
    config = json.loads((model / "config.json").read_text())
    config["connector_moe"]["norm_topk_prob"] = False
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the connector \(2 experts, top-2\) have weights that do not sum to one"):
        exported(model, tmp_path / "out")


def test_raises_when_a_mean_is_asked_for_and_none_is_needed(checkpoint, tmp_path, leaves_nothing):
    for to in ("llava", "text"):
        with leaves_nothing(), pytest.raises(ValueError, match="the export is exact"):
            exported(checkpoint, tmp_path / "out", to=to, mean_experts=True)


def test_the_mean_of_unlike_experts_is_written_when_asked_for(tmp_path):
    checkpoint = save_vlmoe(tmp_path / "vlmoe", vision_moe=EXPERTS, connector_moe=EXPERTS)
    out = exported(checkpoint, tmp_path / "out", mean_experts=True)
    receipt = receipt_of(out)
    assert not receipt["is_exact"]
    assert (
        receipt["proof"]["informative"]["image features by the mean of the experts, from those by the experts"] > 0.01
    )
    assert receipt["proof"]["gaps"]["logits"]["gap"] <= LIMIT  # of the LM, given the same image features
    stack = CheckpointReader(checkpoint).tensor("model.connector.mlp.experts.down_proj")
    written = CheckpointReader(out).tensor("multi_modal_projector.linear_2.weight")
    torch.testing.assert_close(written, stack.mean(0))


@torch.no_grad()
def test_experts_that_are_still_copies_become_dense_exactly(upcycled, tmp_path):
    out = exported(upcycled, tmp_path / "out")
    receipt = receipt_of(out)
    assert receipt["is_exact"]
    assert receipt["mapping"]["dropped"]["vlmoe"] == {
        "the connector part's experts are written as one dense MLP (equal copies)": 1,
        "the vision part's experts are written as one dense MLP (equal copies)": 2,
    }
    found, wanted = (AutoModelForImageTextToText.from_pretrained(one)(**inputs()).logits for one in (out, upcycled))
    assert gap(found, wanted) <= LIMIT


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "gguf"}, r"--to is 'gguf'; expected one of native, llava, text"),
        ({"checkpoint": None}, "Name the checkpoint to export"),
        ({"checkpoint": "/no/such"}, "checkpoint /no/such: there is no such folder"),
        ({"output_dir": None}, "Give --output-dir"),
        ({"revision": "main"}, "--revision main is given, but"),
    ],
    ids=str,
)
def test_raises_when_settings_make_no_sense(checkpoint, tmp_path, settings, message):
    given = {"checkpoint": str(checkpoint), "output_dir": str(tmp_path / "out")} | settings
    with pytest.raises(ValueError, match=message):
        export(ExportArguments(**given))


def test_raises_when_it_is_no_vlmoe_model(parents, tmp_path):
    with pytest.raises(ValueError, match="is a llama model; expected a vlmoe one"):
        exported(parents / "llama", tmp_path / "out")


def test_raises_when_the_output_would_overwrite_the_checkpoint(checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "vlmoe")
    with pytest.raises(ValueError, match="would be overwritten"):
        exported(copied, copied, force=True)
