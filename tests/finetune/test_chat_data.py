"""Rows from JSONL files and folders, and what is said about a wrong one."""

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List
from PIL import Image as PILImage

from modeling_vlmoe.finetune import load_chat_data

SAY = {"role": "assistant", "content": "red"}
LOOK = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}
PLAIN = {"role": "user", "content": "two and two?"}


@pytest.fixture
def write(tmp_path):
    """Writes rows as a JSONL file beside a picture a.png; a string is written as it is."""
    PILImage.new("RGB", (24, 24), (200, 0, 0)).save(tmp_path / "a.png")

    def build(*rows, name="rows.jsonl"):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return build


GOOD = {"messages": [LOOK, SAY], "images": ["a.png"]}


def test_jsonl_rows_keep_text_images_and_their_line(write):
    rows = load_chat_data(
        write(GOOD, "", {"messages": [PLAIN, SAY], "kind": 3}, {"messages": [PLAIN, SAY], "images": []})
    )
    assert [row["row"] for row in rows] == [1, 3, 4]
    assert [len(row["images"]) for row in rows] == [1, 0, 0]
    assert rows[0]["images"][0]["path"].endswith("a.png")
    assert rows[0]["images"][0]["bytes"] is None
    assert [part["type"] for part in rows[0]["messages"][0]["content"]] == ["image", "text"]
    assert rows[1]["messages"][0]["content"] == [{"type": "text", "text": "two and two?"}]


def test_further_columns_are_those_of_all_rows(write):
    rows = load_chat_data(write(GOOD | {"kind": "colour", "meta": {"a": 1}}, GOOD | {"kind": 7}, GOOD | {"late": 2}))
    assert [row["late"] for row in rows] == [None, None, 2]
    assert rows[0]["kind"] == "colour"
    assert rows[0]["meta"] == {"a": 1}
    assert rows[1]["kind"] == 7


def test_a_changed_file_is_read_again(write):
    assert len(load_chat_data(write(GOOD))) == 1
    path = write(GOOD, GOOD)
    os.utime(path, ns=(1, 1))
    assert len(load_chat_data(path)) == 2


def test_an_image_deleted_after_the_first_reading_is_missed(write, tmp_path):
    path = write(GOOD)
    load_chat_data(path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: there is no image .*a.png"):
        load_chat_data(path)


def test_keys_that_arrow_adds_are_no_error(write):
    row = {"messages": [PLAIN | {"name": None}, SAY]}
    assert load_chat_data(write(row))[0]["messages"][0]["role"] == "user"


def test_folder_of_jsonl_splits(pictures):
    assert len(load_chat_data(pictures, "train")) == 8
    assert len(load_chat_data(pictures, "test")) == 4
    with pytest.raises(ValueError, match=r"has no validation.jsonl or validation.json, only test.jsonl, train.jsonl"):
        load_chat_data(pictures, "validation")


def test_imagefolder_with_messages(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    rows = []
    for name in ("a", "b"):
        PILImage.new("RGB", (24, 24)).save(folder / f"{name}.png")
        rows.append(
            json.dumps(
                {
                    "file_name": f"{name}.png",
                    "messages": [LOOK | {}, SAY | {"content": [{"type": "text", "text": name}]}],
                }
            )
        )
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    loaded = load_chat_data(tmp_path, "train")
    assert [row["messages"][1]["content"][0]["text"] for row in loaded] == ["a", "b"]
    assert [len(row["images"]) for row in loaded] == [1, 1]
    assert "image" not in loaded.column_names


def test_parquet_with_embedded_images(tmp_path, pictures):
    source = load_chat_data(pictures, "test").select_columns(["messages", "images", "kind"])
    embedded = [
        row | {"images": [{"bytes": Path(i["path"]).read_bytes(), "path": None} for i in row["images"]]}
        for row in source
    ]
    features = Features(dict(source.features) | {"images": List(Image())})
    (tmp_path / "data").mkdir()
    Dataset.from_list(embedded, features=features).to_parquet(tmp_path / "data" / "train-00000.parquet")
    loaded = load_chat_data(tmp_path)
    assert loaded[0]["images"][0]["bytes"][:4] == b"\x89PNG"
    assert loaded[0]["kind"] == "colour"
    assert loaded[3]["row"] == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "row 2 is not valid JSON"),
        ("3", "row 2 is 3; expected an object"),
        ({"images": []}, 'row 2 has no "messages"'),
        ({"messages": []}, 'row 2 has no "messages"'),
        ({"messages": ["hi"]}, "row 2: a message is 'hi'"),
        ({"messages": [{"role": "user"}, SAY]}, 'row 2: a message\'s "content" is None'),
        ({"messages": [PLAIN]}, "row 2 has no message of the assistant"),
        ({"messages": [LOOK, SAY]}, "row 2 has 0 images, but 1 image parts"),
        ({"messages": [PLAIN, SAY], "images": ["a.png"]}, "row 2 has 1 images, but 0 image parts"),
        (
            {"messages": [PLAIN | {"role": "bot"}, SAY]},
            "row 2: a message's role is 'bot'; expected one of system, user",
        ),
        ({"messages": [PLAIN, SAY | {"reasoning_content": "hm"}]}, "row 2: a message has the keys reasoning_content"),
        ({"messages": [LOOK, SAY], "images": ["b.png"]}, "row 2: there is no image .*b.png. Paths are relative"),
        ({"messages": [LOOK, SAY], "images": [3]}, 'row 2: "images" is .3.; expected a list of paths'),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, SAY]}, "row 2: a part of a message is"),
        (
            {
                "messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}, SAY],
                "images": ["a.png"],
            },
            "with the images named in",
        ),
    ],
)
def test_raises_when_a_row_is_malformed(write, row, message):
    with pytest.raises(ValueError, match=message):
        load_chat_data(write(GOOD, row))


def test_raises_when_there_is_nothing_to_read(write, tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        load_chat_data(write(""))
    with pytest.raises(ValueError, match="is no JSONL file"):
        load_chat_data(write(GOOD, name="rows.txt"))
    with pytest.raises(ValueError, match="Cannot load the data"):
        load_chat_data(tmp_path / "nowhere")


def test_raises_when_the_file_is_no_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1 is not UTF-8 text"):
        load_chat_data(path)


def test_raises_when_there_is_no_such_split(tmp_path):
    Dataset.from_list([{"messages": [PLAIN, SAY]}]).to_parquet(tmp_path / "train-00000.parquet")
    with pytest.raises(ValueError, match=rf"Cannot load the data {tmp_path}, split dev: .*train_split and eval_split"):
        load_chat_data(tmp_path, "dev")
