"""The demo's scenes: disjoint splits, questions that only the picture answers, pictures that follow their seed."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from modeling_vlmoe.finetune.demo.scenes import (
    CELL_LABELS,
    CELL_OF_PATCH,
    IMAGE_SIZE,
    KINDS,
    NUM_ANSWERS,
    Item,
    QuestionBank,
    Scene,
    all_scenes,
    cell_labels,
    cell_words,
    describe,
    patch_labels,
    questions_about,
    render,
    split_scenes,
)
from modeling_vlmoe.finetune.demo.settings import DemoSettings
from modeling_vlmoe.finetune.demo.write_data import write_dataset

SEEDS = (0, 1, 2)
TWO_ITEMS = Scene((Item(0, "red", "circle"), Item(3, "blue", "square")))


@pytest.mark.parametrize("seed", SEEDS)
def test_train_and_held_out_scenes_are_disjoint_and_complete(seed):
    train, held_out = split_scenes(seed)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(all_scenes())
    assert len(train) + len(held_out) == len(all_scenes()) == 48 + 864


def test_raises_when_the_held_out_share_is_no_share():
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        split_scenes(0, held_out_share=1.5)


def test_raises_when_scenes_are_too_few_for_a_question():
    with pytest.raises(ValueError, match="has only the answers"):
        QuestionBank([TWO_ITEMS])


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_of_each_kind_are_equally_frequent(seed):
    samples = QuestionBank(split_scenes(seed)[1]).balanced(2000, np.random.default_rng(seed))
    for kind in KINDS:
        counts = Counter(sample.answer for sample in samples if sample.kind == kind)
        assert sum(counts.values()) == 400
        assert len(counts) == NUM_ANSWERS[kind]
        assert max(counts.values()) <= 400 / NUM_ANSWERS[kind] + 2


@pytest.mark.parametrize("seed", SEEDS)
def test_question_text_does_not_give_its_answer_away(seed):
    samples = QuestionBank(split_scenes(seed)[1]).balanced(2000, np.random.default_rng(seed))
    answers = defaultdict(Counter)
    for sample in samples:
        answers[sample.kind, sample.question][sample.answer] += 1
    for kind in KINDS:  # the best that a blind oracle, which has seen these very answers, can do
        num_right = sum(max(counts.values()) for (of_kind, _), counts in answers.items() if of_kind == kind)
        assert num_right / 400 <= 1 / NUM_ANSWERS[kind] + 0.03


def test_every_sample_has_the_answer_its_scene_gives():
    for sample in QuestionBank(split_scenes(0)[0]).balanced(500, np.random.default_rng(0)):
        known = {question.text: question.answer for question in questions_about(sample.scene)}
        assert known[sample.question] == sample.answer


@pytest.mark.parametrize("scene", [scene for scene in all_scenes() if len(scene.items) == 2][::40], ids=describe)
def test_a_question_on_one_of_two_items_is_wrong_for_the_other(scene):
    answers = defaultdict(set)
    for question in questions_about(scene):
        answers[question.text].add(question.answer)
    assert all(len(found) == 1 for found in answers.values())
    for item in scene.items:
        other = next(found for found in scene.items if found != item)
        colours = [q.answer for q in questions_about(scene) if q.text == f"What colour is the {item.shape}?"]
        assert colours in ([], [item.colour])
        assert not colours or item.shape != other.shape


def test_words_and_labels_name_the_same_cells():
    assert describe(TWO_ITEMS) == "a red circle at the top-left and a blue square at the bottom-right"
    assert cell_words(TWO_ITEMS).split() == [
        "top-left-red-circle",
        "top-right-empty",
        "bottom-left-empty",
        "bottom-right-blue-square",
    ]
    assert [CELL_LABELS[label] for label in cell_labels(TWO_ITEMS)] == ["red circle", "empty", "empty", "blue square"]
    assert CELL_OF_PATCH == (0, 0, 1, 1) * 2 + (2, 2, 3, 3) * 2
    assert [CELL_LABELS[label] for label in patch_labels(TWO_ITEMS)[-2:]] == ["blue square"] * 2


def test_rendering_follows_its_seed():
    first, again, other = (np.asarray(render(TWO_ITEMS, np.random.default_rng(seed))) for seed in (0, 0, 1))
    assert first.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("cell", range(4))
def test_item_is_drawn_in_its_cell(cell):
    image = np.asarray(render(Scene((Item(cell, "blue", "square"),)), np.random.default_rng(cell))).astype(int)
    rows, columns = np.nonzero(image[..., 2] - image[..., 0] > 90)
    assert (rows.mean() // 24 * 2 + columns.mean() // 24) == cell


def test_dataset_rows_are_chats_with_pictures(tmp_path):
    settings = DemoSettings(num_align=6, num_train=20, num_test=10)
    write_dataset(tmp_path, settings)
    for name, num_rows in (("align", 6), ("train", 20), ("test", 10)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(rows) == num_rows
        for row in rows:
            assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
            assert row["messages"][1]["content"][0]["text"]
            assert row["kind"] in (KINDS if name != "align" else (*KINDS, "describe"))
            with Image.open(tmp_path / row["images"][0]) as image:
                assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_dataset_loads_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_dataset(tmp_path, DemoSettings(num_align=2, num_train=5, num_test=5))
    rows = datasets.load_dataset(
        "json", data_files=str(tmp_path / "test.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    assert rows[0]["images"][0].startswith("images/test-")
