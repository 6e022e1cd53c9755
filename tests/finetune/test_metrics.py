"""The metric against numbers computed by hand, without a network."""

import evaluate
import pytest

from modeling_vlmoe.finetune.metrics import VQAExactMatch, normalize_answer, wilson_interval


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("Red.", "red"),
        ("  The red  circle ", "red circle"),
        ("A red, round thing!", "red round thing"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("top-left", "top left"),
        ("it's", "it's"),
        ("an apple?", "apple"),
        ("", ""),
        ("A", "a"),
        ("A.", "a"),
        ("the", "the"),
        ("+", "+"),
        ("-5", "-5"),
        ("It is -2.5.", "it is -2.5"),
        (".5", ".5"),
        ("3-5", "3 5"),
    ],
)
def test_answers_are_normalised_as_in_vqa(given, normal):
    assert normalize_answer(given) == normal
    assert normalize_answer(normal) == normal


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"), [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0)]
)
def test_wilson_interval_has_the_known_values(correct, count, low, high):
    assert wilson_interval(correct, count) == pytest.approx((low, high), abs=2e-6)


def test_wilson_limits_are_where_the_normal_test_rejects():
    for limit in wilson_interval(850, 1000):
        assert abs(0.85 - limit) == pytest.approx(1.959964 * (limit * (1 - limit) / 1000) ** 0.5, rel=1e-6)


def test_accuracy_overall_and_per_group():
    result = VQAExactMatch().compute(
        predictions=["Red", "a blue", "2", "no", "x"],
        references=["red", "blue", "three", "yes", "X."],
        groups=["colour", "colour", "count", "yes/no", "count"],
    )
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["count"] == 5
    assert {name: (group["accuracy"], group["count"]) for name, group in result["groups"].items()} == {
        "colour": (1.0, 2),
        "count": (0.5, 2),
        "yes/no": (0.0, 1),
    }
    assert result["groups"]["colour"]["low"] == pytest.approx(wilson_interval(2, 2)[0])


def test_groups_are_optional_and_batches_add_up():
    metric = VQAExactMatch()
    metric.add_batch(predictions=["a cat"], references=["cat"])
    metric.add(prediction="dog", reference="cat")
    result = metric.compute()
    assert (result["accuracy"], result["count"]) == (0.5, 2)
    assert "groups" not in result


def test_metric_is_one_of_evaluates():
    assert isinstance(VQAExactMatch(), evaluate.Metric)
    combined = evaluate.combine([VQAExactMatch()])
    assert combined.compute(predictions=["a"], references=["b"])["accuracy"] == 0.0


def test_raises_when_groups_are_too_few():
    with pytest.raises(ValueError, match="groups has 1 entries, but there are 2 answers"):
        VQAExactMatch().compute(predictions=["a", "b"], references=["a", "b"], groups=["x"])
