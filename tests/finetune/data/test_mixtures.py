"""Several sources as one: every row once, or rows drawn with weights; each says where it is from."""

import json
from collections import Counter

import pytest

from modeling_vlmoe.finetune import load_chat_data
from modeling_vlmoe.finetune.rows import where_is
from tests.finetune.data import forms


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    return folder / name


@pytest.fixture
def sources(tmp_path):
    """Twelve questions with images and four rows of text alone, of two forms and in two folders."""
    forms.draw(tmp_path)
    asked = [forms.as_vqa(forms.ONE) | {"kind": number} for number in range(12)]
    texts = [forms.as_llava(forms.TEXT) for _ in range(4)]
    return write(tmp_path, "asked.jsonl", asked), write(tmp_path / "other", "texts.jsonl", texts)


def test_all_rows_come_once_and_say_their_source(sources):
    rows = load_chat_data(sources)
    assert Counter(rows["data_source"]) == {"asked.jsonl": 12, "texts.jsonl": 4}
    assert [row["row"] for row in rows] == [*range(1, 13), *range(1, 5)]
    assert list(rows["kind"]) == [*range(12), *[None] * 4]
    assert where_is(rows[13]) == "Row 2 of texts.jsonl"


def test_one_source_in_a_list_is_named_too(sources):
    assert set(load_chat_data(sources[:1])["data_source"]) == {"asked.jsonl"}


def test_the_same_name_twice_is_counted(sources, tmp_path):
    again = write(tmp_path / "third", "texts.jsonl", [forms.as_llava(forms.TEXT)])
    assert set(load_chat_data([*sources, again])["data_source"]) == {"asked.jsonl", "texts.jsonl", "texts.jsonl (2)"}


def test_weights_are_shares_and_no_row_is_left_out(sources):
    rows = load_chat_data(sources, weights=[1, 3], seed=3)
    drawn = Counter(rows["data_source"])
    assert {row["kind"] for row in rows} == {*range(12), None}
    assert drawn["asked.jsonl"] == 12
    assert 0.6 < drawn["texts.jsonl"] / len(rows) < 0.9
    assert list(rows["row"]) == list(load_chat_data(sources, weights=[10, 30], seed=3)["row"])
    assert list(rows["row"]) != list(load_chat_data(sources, weights=[1, 3], seed=4)["row"])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, 2, 3], [float("inf"), 1]])
def test_raises_when_weights_are_wrong(sources, weights):
    with pytest.raises(ValueError, match=r"data_weights is .* for 2 data; give each one a finite weight above 0"):
        load_chat_data(sources, weights=weights)


def test_raises_when_there_is_nothing_to_mix(sources):
    with pytest.raises(ValueError, match="data_weights are for several data"):
        load_chat_data(sources[0], weights=[1])
    with pytest.raises(ValueError, match="data names no source"):
        load_chat_data([])


def test_columns_of_unlike_types_keep_their_values(sources, tmp_path):
    typed = forms.write("parquet", tmp_path / "typed", [forms.as_vqa(forms.ONE) | {"kind": "a word"}])
    rows = load_chat_data([sources[0], typed])
    assert list(rows["kind"]) == [*range(12), "a word"]
    assert rows[12]["answers"] == ["grey", "red", "red"]
    assert rows[12]["images"][0]["bytes"][:4] == b"\x89PNG"


def test_raises_when_a_column_has_the_sources_name(sources, tmp_path):
    named = write(tmp_path, "named.jsonl", [forms.as_vqa(forms.TEXT) | {"data_source": "mine"}])
    with pytest.raises(
        ValueError, match="has a column data_source, which is to say the source; give yours another name"
    ):
        load_chat_data([sources[0], named])


def test_a_wrong_row_of_one_source_is_named_with_its_file(sources, tmp_path):
    wrong = write(tmp_path, "wrong.jsonl", [{"conversations": []}])
    with pytest.raises(ValueError, match=r"wrong.jsonl, row 1 has no"):
        load_chat_data([*sources, wrong])
