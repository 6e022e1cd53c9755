"""A folder of images becomes rows, and the rows are split by image."""

import csv
import json

import pytest
from PIL import Image

from modeling_vlmoe.finetune.classifier.data import load_data, read_rows, split_rows
from modeling_vlmoe.finetune.classifier.digits import TASKS, write_digits

QUESTION = "What is it?"


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (number, 0, 0)).save(folder / name)
    return folder


def write_metadata(folder, records, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, sorted({key for record in records for key in record}))
            writer.writeheader()
            writer.writerows(records)
        else:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return folder


@pytest.fixture
def pets(tmp_path):
    return write_images(tmp_path / "pets", [f"{name}/{index}.png" for name in ("cat", "dog") for index in range(6)])


def test_a_sub_folder_is_a_class(pets):
    (pets / "cat" / "notes.txt").write_text("no image")
    rows = read_rows(pets, QUESTION)
    assert [row.label for row in rows] == ["cat"] * 6 + ["dog"] * 6
    assert {(row.text, row.task) for row in rows} == {(QUESTION, QUESTION)}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_names_image_text_label_and_task(pets, name):
    records = [{"file_name": "cat/0.png", "text": "Which pet?", "label": "cat", "task": "pet"}]
    (row,) = read_rows(write_metadata(pets, records, name), QUESTION)
    assert (row.image, row.text, row.label, row.task) == (str(pets / "cat/0.png"), "Which pet?", "cat", "pet")


@pytest.mark.parametrize(("num_texts", "num_tasks"), [(3, 3), (20, 1)])
def test_a_text_is_a_task_where_there_are_few(pets, num_texts, num_tasks):
    texts = [f"Question {number}?" for number in range(num_texts)]
    records = [{"file_name": "cat/0.png", "text": text, "label": "cat"} for text in texts]
    assert len({row.task for row in read_rows(write_metadata(pets, records), QUESTION)}) == num_tasks


def test_no_image_is_in_both_splits_and_each_class_has_its_share(tmp_path):
    rows = read_rows(write_digits(tmp_path, 400), QUESTION)
    train, test = split_rows(rows, 0.25)
    images = [{row.image for row in part} for part in (train, test)]
    assert not images[0] & images[1]
    assert (len(images[0]), len(images[1])) == (300, 100)
    for digit in map(str, range(10)):
        of_digit = [sum(row.label == digit for row in part) for part in (train, test)]
        assert abs(of_digit[1] / sum(of_digit) - 0.25) < 0.03
    assert split_rows(rows, 0.25) == (train, test)
    for part in (train, test):
        for task in TASKS:
            assert {row.image for row in part if row.task == task.name} == {row.image for row in part}


def test_the_label_of_a_digit_depends_on_image_and_text(tmp_path):
    rows = read_rows(write_digits(tmp_path, 20), QUESTION)
    five = {row.task: row.label for row in rows if row.image.endswith("5/0005.png")}
    assert five == {"digit": "5", "parity": "odd", "above four": "above"}
    assert len({row.text for row in rows}) == sum(len(task.texts) for task in TASKS)


def test_a_folder_that_is_split_stays_so(pets, tmp_path):
    for name in ("train", "test"):
        write_images(tmp_path / "split" / name, ["cat/1.png", "dog/1.png"])
    data = load_data(tmp_path / "split", QUESTION, 0.25)
    assert (len(data.train), len(data.test), data.labels) == (2, 2, ["cat", "dog"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no samples"),
        (["cat/0.png", "cat/1.png", "dog/0.png"], "Of dog there is one image alone"),
        ([f"cat/{index}.png" for index in range(6)], "one class, cat"),
        ([f"{name}/{index}.png" for name in "abcde" for index in range(2)], "leave fewer than one image of each"),
    ],
)
def test_raises_when_there_is_nothing_to_learn(tmp_path, names, message):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=message):
        load_data(write_images(tmp_path / "data", names), QUESTION, 0.25)


def test_raises_when_the_folder_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nothing is no folder"):
        load_data(tmp_path / "nothing", QUESTION, 0.25)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"file_name": "cat/0.png", "text": "What?"}, "record 1 has no label"),
        ({"file_name": "cat/9.png", "text": "What?", "label": "cat"}, r"cat/9\.png cannot be read"),
    ],
)
def test_raises_when_metadata_is_wrong(pets, record, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write_metadata(pets, [record]), QUESTION)


@pytest.mark.parametrize(("line", "message"), [("{", "line 1 is not JSON"), ("3", "line 1 is 3; expected an object")])
def test_raises_when_a_line_is_no_object(pets, line, message):
    (pets / "metadata.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_rows(pets, QUESTION)


def test_raises_when_an_image_is_broken(pets):
    (pets / "dog" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"dog/0\.png cannot be read"):
        read_rows(pets, QUESTION)


def test_raises_when_the_test_has_an_unknown_class(tmp_path):
    write_images(tmp_path / "train", ["cat/0.png", "dog/0.png"])
    write_images(tmp_path / "test", ["bird/0.png"])
    with pytest.raises(ValueError, match="classes \\['bird'\\], which no training row has"):
        load_data(tmp_path, QUESTION, 0.25)
