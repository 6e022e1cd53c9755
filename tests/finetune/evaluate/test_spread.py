"""Spread, differences, groups and tables, against plain loops and closed forms."""

import numpy as np
import pytest

from modeling_vlmoe.finetune.evaluate.captions import bleus
from modeling_vlmoe.finetune.evaluate.groups import group_by, group_rows
from modeling_vlmoe.finetune.evaluate.judging import DIFFERENCE, THIS, judge
from modeling_vlmoe.finetune.evaluate.tables import latex, latex_text, markdown, markdown_text
from modeling_vlmoe.finetune.evaluate.tasks import TASKS

VQA, YES_NO = TASKS["vqa"].scoring, TASKS["yes-no"].scoring


def scores(values):
    """Statistics of the task vqa whose two measures are equal."""
    return np.repeat(np.array(values, dtype=float)[:, None], 2, axis=1)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(3)
    return scores(random.random(400) < 0.7), scores(random.random(400) < 0.6)


def test_the_spread_over_rows_is_the_binomials(rows):
    line = judge("x", VQA, {THIS: [rows[0]]}, num_samples=2000).measures[0]
    share, cell = rows[0][:, 0].mean(), line.cells[THIS]
    std = (share * (1 - share) / 400) ** 0.5
    assert cell.mean == share
    assert cell.std == pytest.approx(std, rel=0.06)
    assert (cell.low, cell.high) == pytest.approx((share - 1.96 * std, share + 1.96 * std), abs=0.008)
    assert cell.spread_over == "rows"


def test_the_difference_is_paired_row_by_row(rows):
    this, other = rows
    cell = judge("x", VQA, {THIS: [this], "control": [other]}, num_samples=2000).measures[0].cells[DIFFERENCE]
    gaps = this[:, 0] - other[:, 0]
    assert cell.mean == pytest.approx(gaps.mean())
    assert cell.std == pytest.approx(gaps.std() / 20, rel=0.06)  # of a mean of 400 differences
    same = judge("x", VQA, {THIS: [this], "control": [this]}).measures[0].cells[DIFFERENCE]
    assert (same.mean, same.std, same.low, same.high) == (0, 0, 0, 0)


def test_the_spread_over_checkpoints_is_theirs(rows):
    several = [rows[0], rows[1], scores(np.ones(400))]
    judged = judge("x", VQA, {THIS: several, "control": [rows[1]]})
    means = [one[:, 0].mean() for one in several]
    cell, gap = judged.measures[0].cells[THIS], judged.measures[0].cells[DIFFERENCE]
    assert (cell.mean, cell.std) == pytest.approx((np.mean(means), np.std(means, ddof=1)))
    assert cell.spread_over == gap.spread_over == "checkpoints"
    assert gap.mean == pytest.approx(np.mean(means) - means[1])
    assert gap.std == pytest.approx(np.std(means, ddof=1))  # one control for all moves no difference


def test_controls_are_paired_checkpoint_by_checkpoint(rows):
    this, other = rows
    judged = judge("x", VQA, {THIS: [this, other], "control": [other, other]})
    gaps = [(this - other)[:, 0].mean(), 0.0]
    cell = judged.measures[0].cells[DIFFERENCE]
    assert (cell.mean, cell.std) == pytest.approx((np.mean(gaps), np.std(gaps, ddof=1)))


def test_groups_their_sizes_and_the_worst_ones_gap():
    values = scores([1, 1, 1, 0, 1, 0, 0, 0])
    groups = group_by("kind", list("aaaabbcc"))
    judged = judge("x", VQA, {THIS: [values]}, [groups])
    found = {
        group.name: (group.measures[0].count, group.measures[0].cells[THIS].mean) for group in judged.groups["kind"]
    }
    assert found == {"a": (4, 0.75), "b": (2, 0.5), "c": (2, 0.0)}
    gap = judged.gaps["kind"]
    assert (gap.label, gap.count, gap.cells[THIS].mean) == ("c", 2, 0.5)  # all rows 4 / 8, group c 0 / 2
    assert judged.as_dict()["by"]["kind"]["worst_group_gap"]["group"] == "c"


def test_measures_that_are_no_means_are_right_in_every_group():
    # a: TP FP FN TN = 2 1 0 1, b: 0 0 1 1.
    counts = np.eye(4)[[0, 0, 1, 3, 2, 3]]
    judged = judge("x", YES_NO, {THIS: [counts]}, [group_by("g", list("aaaabb"))], averaged={"g": "f1"})
    f1 = {group.name: group.measures[3].cells[THIS].mean for group in judged.groups["g"]}
    assert f1 == pytest.approx({"a": 0.8, "b": 0.0})  # P 2/3 and R 1: 2 * 2/3 / (5/3) = 0.8
    assert judged.measures[3].cells[THIS].mean == pytest.approx(2 / 3)  # P 2/3, R 2/3
    assert judged.measures[-1].label == "f1, mean over g"
    assert judged.measures[-1].cells[THIS].mean == pytest.approx(0.4)


def test_a_group_that_a_drawing_misses_does_not_spoil_the_others():
    judged = judge("x", VQA, {THIS: [scores([1, 0, 1, 1])]}, [group_by("g", list("aaab"))])
    assert judged.groups["g"][1].measures[0].cells[THIS].mean == 1.0
    assert np.isfinite(judged.groups["g"][1].measures[0].cells[THIS].std)


def test_drawings_that_do_not_define_a_measure_are_left_out():
    # Always yes, on one yes and three no: recall is 1 wherever there is a yes, and F1 then lies above 0.
    counts = np.eye(4)[[0, 1, 1, 1]]
    measures = {line.label: line.cells[THIS] for line in judge("x", YES_NO, {THIS: [counts]}).measures}
    recall, f1 = measures["recall"], measures["f1"]
    assert (recall.mean, recall.std, recall.low, recall.high) == (1, 0, 1, 1)
    assert f1.mean == pytest.approx(0.4)
    assert f1.low > 0.3  # one yes in four: 2 / 5


def test_what_no_row_defines_is_zero_without_spread():
    counts = np.eye(4)[[3, 3, 3]]  # no, and said so
    judged = judge("x", YES_NO, {THIS: [counts]}, [group_by("g", list("aab"))], averaged={"g": "f1"})
    cells = [line.cells[THIS] for line in judged.measures[1:4]] + [judged.measures[-1].cells[THIS]]
    assert [(cell.mean, cell.std, cell.low, cell.high) for cell in cells] == [(0, 0, 0, 0)] * 4


def test_a_mean_over_groups_lies_in_its_interval_where_a_group_defines_none():
    counts = np.eye(4)[[0, 0, 0, 0, 1, 1, 1, 1]]  # always yes; group b has no yes, so its F1 is 0
    judged = judge("x", YES_NO, {THIS: [counts]}, [group_by("g", list("aaaabbbb"))], averaged={"g": "f1"})
    cell = judged.measures[-1].cells[THIS]
    assert (cell.low, cell.mean, cell.high) == (0.5, 0.5, 0.5)


def test_the_same_seed_gives_the_same_spread(rows):
    first, again, other = (judge("x", VQA, {THIS: [rows[0]]}, seed=seed).as_dict() for seed in (1, 1, 2))
    assert first == again != other


def test_corpus_bleu_of_sums_is_not_a_mean():
    counts = np.array([[3, 2, 1, 1, 4, 3, 2, 1, 4, 4], [1, 0, 0, 0, 4, 3, 2, 1, 4, 8]], dtype=float)
    # Together: 4/8 of the unigrams; c = 8, r = 12: exp(1 - 12/8) * 0.5.
    assert bleus(counts.sum(0))[0] == pytest.approx(np.exp(-0.5) * 0.5)


def test_tables_hold_every_line_and_escape_what_is_special():
    values = scores([1, 0, 1, 0])
    groups = group_by("a_b|c", ["x_1", "x_1", "50 %", "50 %"])
    judged = [judge("vqa", VQA, {THIS: [values], "control": [values]}, [groups], num_samples=50, notes=["Noted."])]
    text = markdown(judged, 50, 1, {"POPE": "there is no folder pope"})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "|  | n | this model | control | difference |"
    assert all(line.replace("\\|", "").count("|") == 6 for line in lines)
    assert any(line.startswith("| 50 % | 2 | 0.500 ± ") for line in lines)
    assert "POPE: not measured, there is no folder pope." in text
    assert "Noted." in text
    assert "over 50 drawings of the rows" in text
    found = latex(judged, 50, 1, {"POPE": "there is no folder pope"})
    assert r"50 \% & 2 & $0.500 \pm " in found
    assert r"soft\_accuracy by a\_b\textbar{}c" in found
    body = found[found.index("\\toprule") : found.index("\\bottomrule")]
    rows = [line for line in body.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
    assert all(line.count("&") == 4 for line in rows)
    assert "over 3 checkpoints" in markdown(judged, 50, 3)


def test_special_characters_are_escaped():
    assert latex_text("a_b & 5% {x} #1 $ ~ ^ \\") == (
        r"a\_b \& 5\% \{x\} \#1 \$ \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert latex_text("a|b <c>") == r"a\textbar{}b \textless{}c\textgreater{}"
    assert markdown_text("a|b\nc") == "a\\|b c"


def test_raises_when_a_row_has_no_value_to_group_by():
    with pytest.raises(ValueError, match=r"Row 2 of the data has no 'kind', as 1 of 2.*Its columns are row, other"):
        group_rows([{"row": 1, "kind": "a"}, {"row": 2, "other": "b"}], "kind")


def test_raises_when_a_column_is_a_name_for_each_row():
    with pytest.raises(ValueError, match="'row' has 600 values in 600 rows; choose a field"):
        group_rows([{"row": number} for number in range(600)], "row")


def test_raises_when_there_is_nothing_to_score():
    with pytest.raises(ValueError, match="no answers to score"):
        VQA.compute(np.zeros((0, 2)))
