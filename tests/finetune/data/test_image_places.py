"""An image lies in the folder of its data, or in `image_folder`; one that leaves it is refused."""

import json

import pytest
from datasets import Dataset
from PIL import Image

from modeling_vlmoe.finetune import load_chat_data, load_chat_stream
from modeling_vlmoe.finetune.data_formats.image_places import library_folders, places_of


@pytest.fixture
def folder(tmp_path):
    """data/rows.jsonl beside data/in.png, data/deep/in.png and out.png; links from within to both sides."""
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    for path in (data / "in.png", data / "deep" / "in.png", tmp_path / "out.png"):
        Image.new("RGB", (8, 8)).save(path)
    (data / "link.png").symlink_to(data / "deep" / "in.png")
    (data / "out_link.png").symlink_to(tmp_path / "out.png")
    (data / "folder_link").symlink_to(tmp_path, target_is_directory=True)
    return data


def write(folder, path):
    (folder / "rows.jsonl").write_text(json.dumps({"image": str(path), "caption": "a"}))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("path", ["in.png", "deep/in.png", "deep/../in.png", "./in.png", "link.png", "{data}/in.png"])
def test_an_image_inside_is_taken_however_it_is_named(folder, path):
    row = load_chat_data(write(folder, path.format(data=folder)))[0]
    assert Image.open(row["images"][0]["path"]).size == (8, 8)


@pytest.mark.parametrize(
    "path",
    ["../out.png", "deep/../../out.png", "{data}/../out.png", "out_link.png", "folder_link/out.png", "/dev/null"],
)
def test_raises_when_an_image_leaves_the_folder(folder, path):
    with pytest.raises(ValueError, match=r"row 1: the image .* leaves .*data, by .*name the folder of the images"):
        load_chat_data(write(folder, path.format(data=folder)))


def test_raises_when_a_link_leads_out_after_the_first_reading(folder, tmp_path):
    path = write(folder, "link.png")
    load_chat_data(path)
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"row 1: the image .*link.png leaves"):
        load_chat_data(path)


def test_image_folder_stands_in_the_data_files_place(folder, tmp_path):
    images = str(tmp_path)
    path = load_chat_data(write(folder, "out.png"), image_folder=images)[0]["images"][0]["path"]
    assert path == str(tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"there is no image .*in.png"):
        load_chat_data(write(folder, "in.png"), image_folder=images)
    with pytest.raises(ValueError, match=r"image_folder .*nowhere is no folder; give the one"):
        load_chat_data(write(folder, "in.png"), image_folder=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("path", "message"), [("in.png", None), ("../out.png", "leaves"), ("no.png", "there is no")])
def test_paths_in_parquet_are_counted_from_its_folder(folder, path, message):
    Dataset.from_list([{"image": path, "caption": "a"}]).to_parquet(folder / "rows.parquet")
    if message is None:
        assert load_chat_data(folder / "rows.parquet")[0]["images"][0]["path"] == str(folder / path)
        return
    with pytest.raises(ValueError, match=f"row 1: .*{message}"):
        load_chat_data(folder / "rows.parquet")


def test_data_of_the_hub_reads_what_the_library_has_downloaded_and_no_other_file(folder):
    places = places_of("somebody/something")
    assert places.folder is None
    for path in ("/etc/hostname", str(folder / "in.png"), "relative.png"):
        assert places.fault(places.stored(path), "row 1").kind == "images_outside_the_folder"
    kept = f"{library_folders()[0]}/datasets--a--b/snapshots/1/a.png"
    assert places.fault(places.stored(kept), "row 1").kind == "missing_images"


@pytest.fixture
def snapshot(tmp_path):
    """A folder as `hf download` fills it: every file is a link to one of the repository's blobs."""
    (blobs := tmp_path / "datasets--a--b" / "blobs").mkdir(parents=True)
    (folder := tmp_path / "datasets--a--b" / "snapshots" / "abc").mkdir(parents=True)
    rows = [{"image": "deep/1.png", "caption": "a"}]
    Image.new("RGB", (8, 8)).save(blobs / "11", format="png")
    (blobs / "22").write_text(json.dumps(rows[0]))
    Dataset.from_list(rows).to_parquet(blobs / "33")
    (folder / "deep").mkdir()
    (folder / "deep" / "1.png").symlink_to("../../../blobs/11")
    return folder


@pytest.mark.parametrize(("name", "blob"), [("rows.jsonl", "22"), ("rows.json", "22"), ("rows.parquet", "33")])
@pytest.mark.parametrize("load", [load_chat_data, load_chat_stream])
def test_a_snapshot_of_the_hub_is_read_over_its_links(load, name, blob, snapshot):
    (snapshot / name).symlink_to(f"../../blobs/{blob}")
    (row,) = list(load(snapshot / name))
    assert row["images"][0]["path"] == str(snapshot / "deep" / "1.png")


@pytest.mark.parametrize("load", [load_chat_data, load_chat_stream])
def test_a_snapshot_as_a_folder_is_read_over_its_links(load, snapshot):
    (snapshot / "train.jsonl").symlink_to("../../blobs/22")
    assert len(list(load(snapshot))) == 1


def test_raises_when_a_snapshots_link_leads_to_another_repository(snapshot, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "1.png")
    (snapshot / "deep" / "1.png").unlink()
    (snapshot / "deep" / "1.png").symlink_to(tmp_path / "other" / "1.png")
    (snapshot / "train.jsonl").symlink_to("../../blobs/22")
    with pytest.raises(ValueError, match=r"row 1: the image .* leaves"):
        load_chat_data(snapshot)
