"""Streams: the rows of a map, shuffled by the seed; workers, prefetching and interruptions change no batch."""

import json
from functools import partial
from itertools import islice

import pytest
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from modeling_vlmoe.finetune import ChatCollator, load_chat_data, load_chat_stream
from modeling_vlmoe.finetune.data_formats.streams import ChatStream
from tests.finetune.data import forms


def asked(number):
    """A question whose answer is a number; every third one is of text alone."""
    images, turns = (forms.ONE, forms.TWO, forms.TEXT)[number % 3]
    return images, [(turns[0][0], f"it is {number}")]


def write_shards(kind, folder, num_rows=11):
    """Rows in two files of a folder, or in one where a folder takes one."""
    folder.mkdir()
    forms.draw(folder)
    rows = [forms.as_messages(asked(number)) for number in range(num_rows)]
    if kind in ("jsonl", "json"):
        return forms.FILES[kind](folder, rows)
    suffix = {"tar": ".tar", "tar.gz": ".tar.gz", "parquet": ".parquet"}[kind]
    writer = forms.write_parquet if kind == "parquet" else forms.write_tar
    for part, shard in enumerate((rows[:6], rows[6:])):
        writer(folder, shard, f"train-{part:05d}{suffix}")
    return folder


def answers(rows):
    return [int(row["messages"][1]["content"][0]["text"].rpartition(" ")[2]) for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "json", "tar", "tar.gz", "parquet"])
def test_a_stream_holds_the_rows_of_a_map(kind, tmp_path, processor):
    source = write_shards(kind, tmp_path / "data")
    stream, mapped = load_chat_stream(source, buffer=0), load_chat_data(source)
    assert isinstance(stream, IterableDataset)
    found = list(stream)
    for row, other in zip(found, mapped, strict=True):
        assert {name: row[name] for name in ("messages", "images")} == {
            name: other[name] for name in ("messages", "images")
        }
    batch, wanted = ChatCollator(processor)(found), ChatCollator(processor)(list(mapped))
    for name in wanted:
        assert torch.equal(batch[name], wanted[name]), name


@pytest.mark.parametrize("form", ["llava", "vqa", "captions"])
def test_a_stream_takes_every_form(form, tmp_path):
    path = forms.write("jsonl", tmp_path, forms.rows_of(form))
    rows, stream = (
        load(path, question=forms.QUESTION) for load in (load_chat_data, partial(load_chat_stream, buffer=0))
    )
    assert [row["messages"] for row in stream] == list(rows["messages"])


def test_passes_hold_every_row_once_each_in_another_order(tmp_path):
    stream = load_chat_stream(write_shards("tar", tmp_path / "data"), seed=1, buffer=4)
    drawn = answers(islice(ChatStream(stream, 2), 33))
    passes = [drawn[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(one) == list(range(11)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert drawn == answers(islice(ChatStream(stream, 2), 33))
    other = load_chat_stream(write_shards("tar", tmp_path / "other"), seed=2, buffer=4)
    assert drawn != answers(islice(ChatStream(other, 2), 33))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("num_workers", "first"), [(1, 0), (3, 0), (0, 14), (3, 14)])
def test_workers_and_interruptions_change_no_batch(num_workers, first, tmp_path):
    stream = load_chat_stream(write_shards("tar", tmp_path / "data"), buffer=4)
    whole = [answers(batch) for batch in islice(DataLoader(ChatStream(stream, 2), 2, collate_fn=list), 16)]
    workers = {"num_workers": num_workers, "prefetch_factor": 3} if num_workers else {}
    loader = DataLoader(ChatStream(stream, 2, first_row=first), 2, collate_fn=list, **workers)
    assert [answers(batch) for batch in islice(loader, 16 - first // 2)] == whole[first // 2 :]


def test_sources_are_mixed_by_their_weights(tmp_path):
    long, short = write_shards("tar", tmp_path / "long"), write_shards("jsonl", tmp_path / "short", 3)
    rows = list(load_chat_stream([long, short], weights=[1, 1], seed=0, buffer=0))
    sources = [row["data_source"] for row in rows]
    assert {row["row"] for row in rows if row["data_source"] == "rows.jsonl"} == {1, 2, 3}
    assert sources.count("long") == 11
    assert sources.count("rows.jsonl") > 3


def test_raises_when_streams_have_no_weights(tmp_path):
    long, short = write_shards("tar", tmp_path / "long"), write_shards("jsonl", tmp_path / "short")
    with pytest.raises(ValueError, match="nobody knows how long they are; give data_weights"):
        load_chat_stream([long, short])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows.jsonl, row 3 is not valid JSON"),
        ({"messages": []}, 'rows.jsonl, row 3 has no "messages"'),
        ({"messages": forms.as_messages(forms.ONE)["messages"], "images": ["../a.png"]}, "row 3: the image .* leaves"),
        ({"messages": forms.as_messages(forms.ONE)["messages"], "images": ["a.png"]}, "row 3: there is no image"),
    ],
)
def test_a_wrong_row_is_named_when_it_is_read(row, message, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_vlmoe.finetune.data_formats.streams.NUM_LOOKED_AT", 2)
    good = forms.as_messages(forms.TEXT)
    rows = [json.dumps(one) for one in (good, good)] + [row if isinstance(row, str) else json.dumps(row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    rows = iter(load_chat_stream(tmp_path / "rows.jsonl", buffer=0))
    assert [next(rows)["row"], next(rows)["row"]] == [1, 2]
    with pytest.raises(ValueError, match=message):
        next(rows)


def test_raises_when_text_alone_cannot_be_learnt_from(tmp_path):
    stream = ChatStream(load_chat_stream(write_shards("tar", tmp_path / "data"), buffer=0), 2, needs_images=True)
    with pytest.raises(ValueError, match=r"Row 3 of train-00000.tar has no image, .* leave text-only rows out"):
        list(islice(stream, 6))


def test_an_imagefolder_is_streamed(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    forms.draw(folder)
    captions = [json.dumps({"file_name": f"{name}.png", "caption": name}) for name in forms.COLOURS]
    (folder / "metadata.jsonl").write_text("\n".join(captions))
    rows = list(load_chat_stream(tmp_path, buffer=0))
    assert sorted(row["messages"][1]["content"][0]["text"] for row in rows) == ["blue", "green", "red"]
    assert [row["row"] for row in rows] == [1, 2, 3]


def test_a_worker_that_is_ahead_sets_the_pass_of_no_other(tmp_path):
    stream = ChatStream(load_chat_stream(write_shards("tar", tmp_path / "data"), buffer=4), 2)
    num_rows = len(list(stream.rows))
    list(islice(stream.passes(), num_rows + 1))
    assert stream.rows.epoch == 0
