"""Files of rows: arrays read piece by piece, tars of samples, folders of them; and what is said of a broken one."""

import json
import tarfile
import tracemalloc

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from modeling_vlmoe.finetune import load_chat_data, load_chat_stream
from modeling_vlmoe.finetune.data_check.check import check_data
from modeling_vlmoe.finetune.data_check.settings import DataCheckSettings
from modeling_vlmoe.finetune.data_formats import containers
from modeling_vlmoe.finetune.data_formats.containers import array_rows
from tests.finetune.data import forms

CAPTIONED = {"question": "a", "answer": "b"}


def read(path):
    return [(raw.number, dict(raw.row), str(raw.fault) if raw.fault else None) for raw in array_rows(path)]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_an_array_is_read_in_pieces_as_a_whole(chunk, tmp_path, monkeypatch):
    rows = [{"a": "ü]},[{" * 3, "b": [1, {"c": None}]}, {}, {"n": 12.5e3}]
    monkeypatch.setattr(containers, "ARRAY_CHUNK", chunk)
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), f" \n{json.dumps(rows)}\n "):
        path.write_text(text, encoding="utf-8-sig")
        assert [row for _, row, fault in read(path) if fault is None] == rows
    path.write_text("[]")
    assert read(path) == []


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ('[{"a": 1}, {"a": ]', 2, "row 2 is not valid JSON"),
        ('[{"a": 1}, {"a": 2}', 3, "row 3 is not valid JSON"),
        ('[{"a": 1}, 7]', 2, "row 2 is 7; expected an object"),
        ('[{"a": 1}] [2]', 2, "goes on behind its array"),
        ('[{"a": 1} {"a": 2}]', 2, "row 2 is not valid JSON: Expecting ',' or ']'"),
        ('[{"a": 1},]', 2, "row 2 is not valid JSON"),
    ],
)
def test_an_array_that_is_broken_says_where(text, number, message, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    found = read(tmp_path / "rows.json")
    assert found[0] == (1, {"a": 1}, None)
    assert message in found[-1][2]
    assert found[-1][0] == number


def test_a_large_array_is_not_held_in_memory(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "x" * 1000} for _ in range(5_000)]))
    tracemalloc.start()
    num_rows = sum(1 for _ in array_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_rows == 5_000
    assert peak < path.stat().st_size / 2


def test_json_lines_may_be_called_json(tmp_path):
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(CAPTIONED) for _ in range(2)))
    assert len(load_chat_data(tmp_path / "rows.json")) == 2


def write_samples(folder, samples, name="train-0.tar"):
    forms.draw(folder)
    with tarfile.open(folder / name, "w") as tar:
        for file, content in samples.items():
            content = (folder / content[1:]).read_bytes() if content.startswith("@") else content.encode()
            forms.add(tar, file, content)
    return folder / name


def test_samples_of_caption_class_and_several_images(tmp_path):
    path = write_samples(
        tmp_path,
        {
            "./a/01.jpg": "@red.png",
            "./a/01.txt": "A red square.\n",
            "02.10.png": "@blue.png",
            "02.9.png": "@green.png",
            "02.json": '{"caption": "Two.", "width": 24}',
        },
    )
    rows = load_chat_data(path)
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == ["A red square.", "Two."]
    assert [[image["path"] for image in row["images"]] for row in rows] == [["a/01.jpg"], ["02.9.png", "02.10.png"]]
    assert rows[1]["width"] == 24
    labelled = load_chat_data(write_samples(tmp_path, {"1.png": "@red.png", "1.cls": "red"}, "labels.tar"))
    assert labelled[0]["messages"][1]["content"][0]["text"] == "red"


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"2.json": "{"}, r"row 2 \(2\) has a file .json that cannot be read"),
        ({"2.json": "[]"}, r"row 2 \(2\) has JSON that is no object"),
        ({"README": "x"}, r"row 2 \(README\) is of no sample: .* Take it out"),
        ({"2.json": '{"caption": "a"}', "2.txt": "b"}, r"row 2 \(2\) has caption in its object and in .txt; keep one"),
        ({"2.json": '{"n": 1' + "0" * 5000 + "}"}, r"row 2 \(2\) has a file .json that cannot be read: .* digits"),
        ({"2.npy": "x"}, r"row 2 \(2\) has a file .npy, of which nothing would be learnt"),
        ({"2.json": '{"image": "b.png"}', "2.a.png": "@red.png"}, "names the image b.png, which the sample does not"),
        (
            {"2.json": '{"images": ["a.png"]}', "2.a.png": "@red.png", "2.b.png": "@red.png"},
            "holds b.png, which its images do not name",
        ),
    ],
)
def test_raises_when_a_sample_is_broken(samples, message, tmp_path):
    path = write_samples(tmp_path, {"1.png": "@red.png", "1.txt": "red", **samples})
    with pytest.raises(ValueError, match=message):
        load_chat_data(path)


@pytest.mark.parametrize("length", [1000, 1024 * 3, 1024 * 3 + 600, 1024 * 3 + 100], ids=str)
def test_raises_when_a_tar_is_cut_off(length, tmp_path):
    """Within the first file, behind one, within a file and within a header."""
    path = write_samples(tmp_path, {f"{number}.json": json.dumps(CAPTIONED) for number in range(8)})
    path.write_bytes(path.read_bytes()[: length if length > 1000 else 530])
    with pytest.raises(ValueError, match=r"cannot be read: .* Write the tar anew"):
        load_chat_data(path)


def test_a_folder_of_tars_has_splits_by_their_names(tmp_path):
    for name in ("train-0.tar", "train-1.tar.gz", "test-0.tar"):
        forms.draw(tmp_path)
        forms.write_tar(tmp_path, [forms.as_vqa(forms.ONE)], name, first=int(name == "train-1.tar.gz"))
    rows = load_chat_data(tmp_path)
    assert [(row["row"], row["data_file"]) for row in rows] == [(1, "train-0.tar"), (1, "train-1.tar.gz")]
    assert len(load_chat_data(tmp_path, "test")) == 1
    with pytest.raises(ValueError, match=r"no tars of the split dev, only test-0.tar, train-0.tar"):
        load_chat_data(tmp_path, "dev")


def test_tars_that_name_no_split_are_all_trained_on(tmp_path):
    forms.draw(tmp_path)
    for name in ("00.tar", "01.tar"):
        forms.write_tar(tmp_path, [forms.as_vqa(forms.ONE)], name)
    assert len(load_chat_data(tmp_path)) == 2


def test_classes_in_parquet_have_their_names(tmp_path):
    forms.draw(tmp_path)
    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"]), "size": Value("int64")})
    rows = {"image": [str(tmp_path / "red.png")] * 2, "label": [1, 0], "size": [3, 4]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "pets.parquet")
    loaded = load_chat_data(tmp_path / "pets.parquet")
    assert [row["messages"][1]["content"][0]["text"] for row in loaded] == ["dog", "cat"]
    assert list(loaded["label"]) == ["dog", "cat"]
    assert list(loaded["size"]) == [3, 4]


def test_raises_when_a_folder_has_rows_of_another_split_alone(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(CAPTIONED))
    with pytest.raises(ValueError, match=r"has no train.jsonl or train.json, only rows.jsonl"):
        load_chat_data(tmp_path)


def test_raises_when_a_folder_has_rows_beside_its_images(tmp_path):
    """LLaVA's own layout, which would be read as an image folder of the classes coco and vg."""
    for name in ("coco", "vg"):
        (tmp_path / name).mkdir()
        forms.draw(tmp_path / name)
    (tmp_path / "llava_mix.json").write_text(json.dumps([forms.as_llava(forms.ONE)]))
    with pytest.raises(ValueError, match=r"no train.jsonl or train.json, only llava_mix.json. Name one of them"):
        load_chat_data(tmp_path)
    with pytest.raises(ValueError, match=r"only llava_mix.json. Name one of them"):
        load_chat_stream(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_raises_when_a_sample_is_a_link(kind, tmp_path):
    path = write_samples(tmp_path, {"1.png": "@red.png", "1.txt": "red", "2.txt": "red"})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = kind, "1.png"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"row 2 \(2\) has 2.png, which is a link or a device; write the file itself"):
        load_chat_data(path)


def test_raises_when_a_sample_has_a_file_twice(tmp_path):
    path = write_samples(tmp_path, {"1.png": "@red.png", "1.txt": "red"})
    with tarfile.open(path, "a") as tar:
        forms.add(tar, "1.txt", b"blue")
    with pytest.raises(ValueError, match=r"row 1 \(1\) has .txt twice; keep one"):
        load_chat_data(path)


def test_raises_when_a_class_in_a_tar_is_a_number(tmp_path):
    path = write_samples(tmp_path, {"1.png": "@red.png", "1.cls": "3"})
    with pytest.raises(ValueError, match="its label is the number 3; give the name of its class"):
        load_chat_data(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"caption": "\\ud800"}', "row 1 holds half a character"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "row 1 is nested too deeply"),
        ('{"a": 1' + "0" * 5000 + "}", "row 1 is not valid JSON: Exceeds the limit"),
    ],
    ids=["surrogate", "deep", "long-number"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_raises_when_json_cannot_be_used(name, text, message, tmp_path):
    (tmp_path / name).write_text(f"[{text}]" if name == "rows.json" else text)
    with pytest.raises(ValueError, match=message):
        load_chat_data(tmp_path / name)
    (tally,) = check_data(DataCheckSettings([str(tmp_path / name)]))
    assert dict(tally.counts) == {"broken_rows": 1}


def test_raises_when_a_folder_cannot_be_read_with_the_reason(tmp_path):
    forms.draw(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../out.png", "caption": "a"}')
    with pytest.raises(ValueError, match=r"Cannot load the data .* Mend the data") as raised:
        load_chat_data(tmp_path)
    assert "error occurred" not in str(raised.value)
