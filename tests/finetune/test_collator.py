"""Batches: what is learnt, and what is refused with its row."""

import pytest
import torch

from modeling_vlmoe.finetune import ChatCollator, load_chat_data
from modeling_vlmoe.finetune.collator import check_rows, count_tokens
from tests.variable_images import TOWERS
from tests.variable_images import processor as variable_processor


@pytest.fixture
def rows(pictures):
    return list(load_chat_data(pictures, "train"))


def test_labels_are_the_answer_and_its_end_of_turn(processor, rows):
    batch = ChatCollator(processor)(rows)
    for index, row in enumerate(rows):
        learnt = batch["labels"][index]
        answer = row["messages"][-1]["content"][0]["text"]
        assert processor.decode(learnt[learnt != -100]) == f"{answer}<|im_end|>"
    said = batch["labels"] != -100
    assert torch.equal(batch["labels"][said], batch["input_ids"][said])


def test_images_and_padding_are_not_learnt(processor, rows):
    batch = ChatCollator(processor)(rows)
    is_image = batch["input_ids"] == processor.image_token_id
    assert (batch["labels"][is_image | (batch["attention_mask"] == 0)] == -100).all()
    assert is_image.sum(-1).tolist() == [len(row["images"]) * processor.num_image_tokens for row in rows]
    assert len(batch["pixel_values"]) == sum(len(row["images"]) for row in rows)


@pytest.mark.parametrize("family", TOWERS)
def test_rows_are_counted_where_each_image_has_its_own_size(rows, family):
    ours = variable_processor(family)
    for row in rows:
        batch = ChatCollator(ours)([row])
        assert count_tokens(row, ours) == batch["input_ids"].shape[1]
        assert ours.image_sizes_name in batch or not row["images"]


def test_every_turn_of_the_assistant_is_learnt(processor):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    batch = ChatCollator(processor)([{"messages": turns}])
    assert processor.decode(batch["labels"][batch["labels"] != -100]) == "b<|im_end|>b<|im_end|>"


def test_a_mixed_batch_gives_its_rows_losses(model, processor, rows):
    collator = ChatCollator(processor)
    together = collator(rows)
    targets = (together["labels"] != -100).sum(-1)
    with torch.no_grad():
        alone = torch.stack([model(**collator([row])).loss for row in rows])
        whole = model(**together).loss
    torch.testing.assert_close(whole, (alone * targets).sum() / targets.sum(), rtol=1e-4, atol=1e-5)


def test_text_only_batch_has_no_pixels(processor, rows):
    assert "pixel_values" not in ChatCollator(processor)([row for row in rows if not row["images"]])


def test_prompts_end_where_the_answer_begins(processor, rows):
    collator = ChatCollator(processor, padding_side="left")
    prompts, whole = collator.prompts(rows), ChatCollator(processor)(rows)
    for index in range(len(rows)):
        prompt = prompts["input_ids"][index][prompts["attention_mask"][index].bool()]
        assert torch.equal(prompt, whole["input_ids"][index][: len(prompt)])
        assert whole["labels"][index][len(prompt)] != -100
        assert (whole["labels"][index][: len(prompt)] == -100).all()


def test_lengths_without_opening_images_are_the_real_ones(processor, rows):
    lengths = ChatCollator(processor)(rows)["attention_mask"].sum(-1).tolist()
    for row, length in zip(rows, lengths, strict=True):
        check_rows([row], processor, length)
        with pytest.raises(ValueError, match=rf"Row {row['row']} of the data is {length} tokens long"):
            check_rows([row], processor, length - 1)


def test_raises_when_a_sample_is_too_long(processor, rows):
    with pytest.raises(
        ValueError, match=r"Row 7 of the data is \d+ tokens long, beyond max_length 50. Images are never"
    ):
        ChatCollator(processor, max_length=50)([rows[6]])


def test_raises_when_an_image_is_unreadable(processor, rows, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    bad = rows[1] | {"images": [{"path": str(broken), "bytes": None}]}
    with pytest.raises(ValueError, match=r"Row 2 of the data: cannot read the image .*broken.png"):
        ChatCollator(processor)([rows[0], bad])
    gone = rows[1] | {"images": [{"path": str(tmp_path / "gone.png"), "bytes": None}]}
    with pytest.raises(ValueError, match="cannot read the image"):
        ChatCollator(processor)([gone])


@pytest.mark.parametrize(("count", "message"), [(0, "fewer images"), (2, "more images")])
def test_raises_when_images_are_unlike_their_places(processor, rows, count, message):
    with pytest.raises(ValueError, match=f"Row 1 of the data has {message}"):
        ChatCollator(processor)([rows[0] | {"images": rows[0]["images"] * count}])


def told(question, *answers):
    said = [{"role": "assistant", "content": answer} for answer in answers]
    return {"messages": [{"role": "user", "content": question}, *said], "images": [], "row": 9}


@pytest.mark.parametrize("check", [check_rows, lambda rows, processor: ChatCollator(processor)(rows)])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (told("a", ""), "Row 9 of the data has no answer of the assistant that is not empty"),
        (told("a", [{"type": "text", "text": " \n"}], ""), "Row 9 of the data has no answer"),
        (told("what is <image>?", "b"), "Row 9 of the data has <image> in its text"),
        (told("a", "", "an <image>"), "Row 9 of the data has <image> in its text"),
    ],
)
def test_raises_when_texts_cannot_be_learnt(processor, row, message, check):
    with pytest.raises(ValueError, match=message):
        check([told("a", "b") | {"row": 1}, row], processor)


def test_raises_when_there_is_nothing_to_learn(processor):
    with pytest.raises(ValueError, match="Row 9 of the data has no token of the assistant"):
        ChatCollator(processor)([told("a", "<think>b</think>")])


def test_one_empty_answer_among_others_is_no_error(processor):
    check_rows([told("a", "", "b")], processor)


def test_an_image_in_the_answer_is_not_learnt(processor, rows):
    messages = [
        {"role": "user", "content": "draw"},
        {"role": "assistant", "content": rows[0]["messages"][0]["content"]},
    ]
    batch = ChatCollator(processor)([{"messages": messages, "images": rows[0]["images"]}])
    learnt = batch["labels"][batch["labels"] != -100]
    assert processor.image_token_id not in learnt
    assert "which colour?<|im_end|>" in processor.decode(learnt)
