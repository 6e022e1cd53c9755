"""The same conversation in each form and each kind of file gives the same batch; what is learnt is answers alone."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_vlmoe.finetune import ChatCollator, load_chat_data
from tests.finetune.data import forms


def batch_of(processor, rows):
    return ChatCollator(processor)([dict(row) for row in rows])


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def wanted_rows(folder, talks):
    return load_chat_data(forms.write("jsonl", folder / "wanted", [forms.as_messages(talk) for talk in talks]))


@pytest.mark.parametrize("kind", forms.FILES)
@pytest.mark.parametrize("form", forms.FORMS)
def test_every_form_in_every_file_gives_the_same_batch(form, kind, processor, tmp_path):
    path = forms.write(kind, tmp_path / "given", forms.rows_of(form))
    found = load_chat_data(path, question=forms.QUESTION)
    wanted = wanted_rows(tmp_path, forms.FORMS[form][1])
    assert_same(batch_of(processor, found), batch_of(processor, wanted))
    assert [len(row["images"]) for row in found] == [len(talk[0]) for talk in forms.FORMS[form][1]]


@pytest.mark.parametrize("talk", forms.TALKS, ids=["one image", "two images", "text", "several turns"])
@pytest.mark.parametrize("form", ["messages", "llava", "sharegpt"])
def test_all_answers_are_learnt_and_nothing_else(form, talk, processor, tmp_path):
    path = forms.write("jsonl", tmp_path, [forms.FORMS[form][0](talk)])
    batch = batch_of(processor, load_chat_data(path))
    learnt = batch["labels"][batch["labels"] != -100]
    assert processor.decode(learnt) == "".join(f"{answer}<|im_end|>" for _, answer in talk[1])


def test_placeholders_in_texts_of_messages_are_images(processor, tmp_path):
    images, turns = forms.TURNS
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    path = forms.write("jsonl", tmp_path / "given", [{"messages": messages, "images": images}])
    wanted = wanted_rows(tmp_path, [forms.TURNS])
    assert_same(batch_of(processor, load_chat_data(path)), batch_of(processor, wanted))


def test_a_system_text_and_a_tool_speak_in_sharegpt(tmp_path):
    turns = [
        {"from": "human", "value": "the weather?"},
        {"from": "gpt", "value": "I ask."},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    path = forms.write("jsonl", tmp_path, [{"conversations": turns, "system": "Be brief."}])
    messages = load_chat_data(path)[0]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize(
    ("given", "learnt", "kept"),
    [
        ({"answer": "red"}, "red", ["red"]),
        ({"answers": ["b", "a", "a"]}, "a", ["b", "a", "a"]),
        ({"answers": [{"answer": "x", "answer_id": 1}, {"answer": "y", "answer_id": 2}]}, "x", ["x", "y"]),
        ({"multiple_choice_answer": "b", "answers": ["a", "a", "b"]}, "b", ["a", "a", "b"]),
    ],
)
def test_the_chosen_or_most_frequent_answer_is_learnt_and_all_are_kept(given, learnt, kept, tmp_path):
    row = load_chat_data(forms.write("jsonl", tmp_path, [{"question": "which?", "image": "red.png"} | given]))[0]
    assert row["messages"][-1]["content"][0]["text"] == learnt
    assert row["answers"] == kept
    assert row["question"] == "which?"


def test_of_several_captions_the_first_is_learnt_and_all_are_kept(tmp_path):
    row = load_chat_data(forms.write("jsonl", tmp_path, [{"image": "red.png", "captions": ["a", "b"]}]))[0]
    texts = [part["text"] for message in row["messages"] for part in message["content"]]
    assert texts == [None, "Describe the image briefly.", "a"]
    assert row["answers"] == ["a", "b"]


def test_a_folder_of_one_folder_per_class(processor, tmp_path):
    for name, colour in forms.COLOURS.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (24, 24), colour).save(tmp_path / "train" / name / "0.png")
    rows = load_chat_data(tmp_path, question=forms.QUESTION)
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["blue", "green", "red"]
    assert [row["label"] for row in rows] == ["blue", "green", "red"]
    wanted = wanted_rows(
        tmp_path, [([f"{name}.png"], [("<image>which colour?", name)]) for name in sorted(forms.COLOURS)]
    )
    assert_same(batch_of(processor, rows), batch_of(processor, wanted))


@pytest.mark.parametrize("form", ["llava", "sharegpt", "vqa", "captions"])
def test_an_imagefolder_with_rows_of_a_form(form, processor, tmp_path):
    row = forms.FORMS[form][0](forms.ONE)
    row = {name: value for name, value in row.items() if name not in ("image", "images", "question")}
    row |= {"file_name": "red.png"} | ({"question": "which colour?"} if form == "vqa" else {})
    folder = tmp_path / "given" / "train"
    folder.mkdir(parents=True)
    forms.draw(folder)
    for name in ("green", "blue"):
        (folder / f"{name}.png").unlink()
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    name = {"sharegpt": "llava"}.get(form, form)  # one image each: LLaVA's column
    found = load_chat_data(tmp_path / "given", data_format=name, question=forms.QUESTION)
    assert_same(batch_of(processor, found), batch_of(processor, wanted_rows(tmp_path, [forms.ONE])))


TURN = {"from": "gpt", "value": "a"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "a", "answer": "b", "caption": "c"}, {}, "may be vqa or captions; say which by data_format"),
        ({"picture": "a"}, {}, r'columns picture; expected "messages", or the columns of another form: messages \('),
        ({"question": "a"}, {}, "expected .messages."),
        ({"caption": "a"}, {"data_format": "vqa"}, "data_format is vqa; expected image, question"),
        ({"caption": "a"}, {"data_format": "coco"}, "data_format is 'coco'; expected one of auto, messages"),
        ({"caption": "a", "image": "red.png"}, {"question": " "}, "question is empty; give one"),
        ({"conversations": [], "image": "red.png"}, {}, 'row 1 has no "conversations"'),
        ({"conversations": [{"from": "gpt", "value": 3}]}, {}, "row 1: a turn is .*expected"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, {}, "a turn is from 'robot'; expected one of human"),
        ({"conversations": [{"from": "human", "value": "a"}]}, {}, "row 1 has no message of the assistant"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "tools": "[]x"}, {}, "row 1 has tools"),
        (forms.as_llava((["red.png"], [("no place", "a")])), {}, "row 1 has 1 images, but 0 image parts"),
        (forms.as_llava(([], [("<image>", "a")])), {}, "row 1 has 0 images, but 1 image parts"),
        ({"question": "a", "answer": None}, {}, "row 1 has no answer; give one"),
        ({"question": "a", "answers": [True]}, {}, r"row 1: its answers are \[True\]; expected a text or a number"),
        (
            {"question": "a", "answer": "<image> b", "image": "red.png"},
            {},
            "row 1 has an image, or <image>, in what the",
        ),
        (forms.as_llava((["red.png"], [("which", "<image> it")])), {}, "row 1 has an image, or <image>, in what the"),
        ({"caption": "a", "image": "red.png", "images": ["red.png"]}, {}, "images under .image. and under .images."),
        ({"caption": "a", "images": [{"bytes": "abc"}]}, {}, "expected a list of paths, written as texts"),
        ({"caption": "a", "images": [{"path": 5}]}, {}, "expected a list of paths, written as texts"),
        (
            {"conversations": [TURN], "image": "red.png", "images": []},
            {},
            "may be llava or sharegpt; say which by data_",
        ),
        (
            {"conversations": [TURN | {"content": "b"}]},
            {},
            "row 1: a turn has content, of which nothing would be learnt",
        ),
        ({"conversations": [TURN | {"weight": 1}]}, {}, "row 1: a turn has weight, of which nothing would be learnt"),
        ({"conversations": [TURN], "system": ["a", "b"]}, {}, 'its "system" is .*; expected a text. Write one'),
        (
            {"caption": "a", "row": 3, "data_file": "b"},
            {},
            "has a column data_file and a column row, which .* give yours",
        ),
        ({"caption": "\ud800", "question": "a"}, {}, "row 1 holds half a character"),
        ({"question": " ", "answer": "a"}, {}, "row 1 has no text under 'question'"),
        ({"caption": "a"}, {}, "row 1 has a caption, but no image that it would be of; give one"),
        ({"caption": [], "image": "red.png"}, {}, "row 1 has no caption; give one"),
        ({"label": 3, "image": "red.png"}, {}, "its label is the number 3; give the name"),
        ({"label": "a", "image": None}, {}, "row 1 has a label, but no image"),
    ],
)
def test_raises_when_a_row_is_not_of_its_form(row, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_chat_data(forms.write("jsonl", tmp_path, [row]), **options)


def test_messages_come_before_other_columns(tmp_path):
    row = forms.as_messages(forms.ONE) | {"question": "a", "answer": "b", "caption": "c", "label": 1}
    loaded = load_chat_data(forms.write("jsonl", tmp_path, [row]))[0]
    assert (loaded["caption"], loaded["label"]) == ("c", 1)


@pytest.mark.parametrize("row", [{"image": "red.png", "images": []}, {"image": "", "images": ["red.png"]}])
def test_an_empty_column_of_images_hides_no_other(row, tmp_path):
    found = load_chat_data(forms.write("jsonl", tmp_path, [row | {"caption": "a"}]))
    assert [Path(image["path"]).name for image in found[0]["images"]] == ["red.png"]


def test_a_number_is_an_answer(tmp_path):
    rows = load_chat_data(forms.write("jsonl", tmp_path, [{"question": "a", "answer": 0}]))
    assert rows[0]["messages"][1]["content"] == [{"type": "text", "text": "0"}]


def test_a_question_that_is_not_asked_is_told_of(tmp_path, caplog):
    path = forms.write("jsonl", tmp_path, [{"question": "a", "answer": "b"}])
    load_chat_data(path, question="What?")
    assert "rows.jsonl are of the form vqa and bring their own; it is not asked" in caplog.text
