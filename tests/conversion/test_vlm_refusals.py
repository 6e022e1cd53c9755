"""What the sweep says of a VLM that it does not convert: refused is what the conversion refuses, and nothing else."""

import pytest

from modeling_vlmoe.conversion.backbones import measuring_vlms
from modeling_vlmoe.conversion.backbones.measuring import measure
from modeling_vlmoe.conversion.backbones.table import NOT_MEASURED, REFUSED, read_table, select
from modeling_vlmoe.conversion.gaps import ProofError

FAMILY = "blip"  # it needs an image
TIMM = ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment.")


def raising(error):
    def stumble(*args, **kwargs):
        raise error

    return stumble


@pytest.mark.parametrize(
    ("where", "error", "kind", "said"),
    [
        ("check_dense_host", ValueError("Give a dense one."), REFUSED, "Give a dense one."),
        ("build_vlm", TIMM, NOT_MEASURED, "needs timm, which was not installed"),
        ("build_vlm", TypeError("no len()"), NOT_MEASURED, "no tiny one could be made: no len()"),
        ("plan_parts", ValueError("Leave the LLM dense."), REFUSED, "Leave the LLM dense."),
        ("plan_parts", TypeError("no len()"), NOT_MEASURED, "a tiny one could not be compared: no len()"),
        ("run_image", ValueError("no image"), NOT_MEASURED, "a tiny one could not be compared: no image"),
        ("judge_logits", ProofError("It differs."), REFUSED, "It differs."),
        ("check_effects", ValueError("Bypassed."), NOT_MEASURED, "a tiny one could not be compared: Bypassed."),
    ],
)
def test_a_family_is_refused_by_the_conversions_words_alone(where, error, kind, said, monkeypatch):
    monkeypatch.setattr(measuring_vlms, where, raising(error))
    found = measure(FAMILY, "vlm")
    assert (found.kind, found.reason, found.gap) == (kind, said, None)


def test_a_family_that_needs_an_image_is_given_no_text_alone(monkeypatch):
    monkeypatch.setattr(measuring_vlms, "run_text", raising(AssertionError("text alone")))
    found = measure(FAMILY, "vlm")
    assert found.reason.startswith("it takes no text without an image: ")
    assert found.image_gap is not None


def test_every_refused_vlm_has_the_words_of_the_conversion():
    rows = select(read_table()["findings"], "vlm", REFUSED)
    advice = ("Give a model with a text_config.", "Leave this layer out of `layers`", "Choose another")
    assert rows
    for row in rows:
        assert any(words in row["reason"] for words in advice), row


def test_only_a_missing_package_keeps_a_vlm_from_being_measured():
    rows = select(read_table()["findings"], "vlm", NOT_MEASURED)
    assert {row["reason"] for row in rows} == {"needs timm, which was not installed"}
