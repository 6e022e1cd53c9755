"""Answers, shuffled images and the majority answer."""

import pytest
import torch

from modeling_vlmoe.finetune import ChatCollator, evaluate_vqa, load_chat_data, majority_baseline, shuffled_images
from modeling_vlmoe.finetune.evaluation import generate_answers, image_key


def rows_of(*images):
    return [{"images": list(paths)} for paths in images]


def keys(images):
    return [tuple(image_key(image) for image in own) for own in images]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_gets_another_rows_images(seed):
    rows = rows_of("a", "a", "b", "b", "b", "c", "d", "", ["a", "b"], ["b", "a"])
    shuffled = shuffled_images(rows, seed)
    for row, images in zip(rows, shuffled, strict=True):
        assert len(images) == len(row["images"])
        assert not images or images != row["images"]
    assert sorted(keys(shuffled)) == sorted(tuple(row["images"]) for row in rows)


def test_shuffling_depends_on_the_seed_only():
    rows = rows_of(*"abcdefgh")
    assert shuffled_images(rows, 1) == shuffled_images(rows, 1)
    assert shuffled_images(rows, 1) != shuffled_images(rows, 2)


def test_raises_when_images_cannot_be_shuffled():
    with pytest.raises(ValueError, match="2 of 3 rows with 1 images have the same"):
        shuffled_images(rows_of("a", "a", "b"))


def test_batched_answers_are_the_single_ones(model, processor, pictures):
    rows = load_chat_data(pictures, "train")
    together = generate_answers(model, processor, rows, batch_size=8, max_new_tokens=5)
    alone = generate_answers(model, processor, rows, batch_size=1, max_new_tokens=5)
    assert together == alone


def test_answers_are_the_models_argmax(model, processor, pictures):
    rows = list(load_chat_data(pictures, "test"))
    answers = generate_answers(model, processor, rows, max_new_tokens=1)
    with torch.no_grad():
        logits = model(**ChatCollator(processor, padding_side="left").prompts(rows)).logits[:, -1]
    assert answers == [processor.decode([token], skip_special_tokens=True).strip() for token in logits.argmax(-1)]


def test_evaluate_vqa_scores_per_kind_and_restores_the_mode(model, processor, pictures):
    model.train()
    rows = load_chat_data(pictures, "train")
    result = evaluate_vqa(model, processor, rows, max_new_tokens=3)
    assert model.training
    assert set(result["groups"]) == {"colour", "other", "pair", "text"}
    assert result["count"] == len(result["predictions"]) == 8
    told = [dict(row) for row in rows]
    for row, answer in zip(told, result["predictions"], strict=True):
        row["messages"] = [*row["messages"][:-1], {"role": "assistant", "content": answer or "nothing"}]
    again = evaluate_vqa(model, processor, told, max_new_tokens=3)
    assert again["accuracy"] == pytest.approx(sum(bool(answer) for answer in result["predictions"]) / 8)


def test_shuffled_images_reach_the_model(model, processor, pictures):
    rows = load_chat_data(pictures, "test")
    shuffled = evaluate_vqa(model, processor, rows, max_new_tokens=5, shuffle_images=True, seed=3)
    assert shuffled["predictions"] != generate_answers(model, processor, rows, max_new_tokens=5)
    swapped = [row | {"images": images} for row, images in zip(rows, shuffled_images(rows, 3), strict=True)]
    assert shuffled["predictions"] == generate_answers(model, processor, swapped, max_new_tokens=5)


def row(answer, kind):
    return {"messages": [{"role": "assistant", "content": answer}], "kind": kind}


def test_majority_answer_is_each_kinds_most_frequent():
    train = [row("red", "colour"), row("red", "colour"), row("blue", "colour"), row("yes", "yes/no")]
    test = [row("red", "colour"), row("blue", "colour"), row("yes", "yes/no"), row("red", "new")]
    result = majority_baseline(train, test)
    assert result["predictions"] == ["red", "red", "yes", "red"]
    assert result["accuracy"] == pytest.approx(3 / 4)
    assert result["groups"]["colour"]["accuracy"] == pytest.approx(1 / 2)


def test_majority_counts_answers_as_the_metric_compares_them():
    train = [row(answer, "colour") for answer in ("Red", "red.", "a red", "blue", "blue")]
    assert majority_baseline(train, [row("RED", "colour")])["accuracy"] == 1.0


def test_raises_when_there_is_nothing_to_count():
    with pytest.raises(ValueError, match="are empty; give those that were trained on"):
        majority_baseline([], [row("red", "colour")])


@pytest.mark.parametrize("lacking", [{}, {"kind": None}])
@pytest.mark.parametrize("order", [1, -1])
def test_raises_before_answering_when_some_rows_lack_a_kind(processor, lacking, order):
    rows = [row("red", "colour"), {"messages": row("red", "")["messages"], "row": 7} | lacking][::order]
    with pytest.raises(ValueError, match=r"Row 7 of the data has no 'kind', as 1 of 2"):
        evaluate_vqa(None, processor, rows)


def test_raises_when_a_row_has_no_answer(model, processor):
    row = {"messages": [{"role": "user", "content": "a"}], "row": 4}
    with pytest.raises(ValueError, match="Row 4 of the data ends with a message of 'user'"):
        majority_baseline([row], [row], None)
