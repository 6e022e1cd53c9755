from pathlib import Path

import pytest

from modeling_vlmoe.conversion.output_folder import (
    check_output_folder,
    check_parents_survive,
    check_space,
    whole_or_nothing,
)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def old(tmp_path):
    """A model folder that is to be replaced."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    return tmp_path / "out"


def test_the_folder_appears_with_its_content(tmp_path):
    with whole_or_nothing(tmp_path / "deep" / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "deep" / "out").exists()
    assert [file.name for file in (tmp_path / "deep" / "out").iterdir()] == ["file"]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_folder_it_replaces_stays_until_it_is_whole(tmp_path, old):
    with whole_or_nothing(old, force=True) as folder:
        (folder / "new").touch()
        assert (old / "config.json").exists()
    assert contents(tmp_path) == ["out", "out/new"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("which", "left"), [(0, {"before": "old", "after": "old"}), (1, {"before": "old", "after": "new"})]
)
def test_an_interruption_around_the_renames_keeps_one_whole_folder(tmp_path, old, monkeypatch, when, which, left):
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        is_hit = len(calls) == which + 1
        if is_hit and when == "before":
            raise KeyboardInterrupt
        rename(self, target)
        if is_hit:
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_or_nothing(old, force=True) as folder:
        (folder / "new").touch()
    assert contents(tmp_path) == ["out", {"old": "out/config.json", "new": "out/new"}[left[when]]]


def test_raises_when_somebody_has_written_there_meanwhile(tmp_path):
    def write():
        with whole_or_nothing(tmp_path / "out") as folder:
            (folder / "new").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "precious").touch()

    with pytest.raises(ValueError, match=r"is not empty"):
        write()
    assert contents(tmp_path) == ["out", "out/precious"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def fail():
        with whole_or_nothing(tmp_path / "out") as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["old"]


def test_an_empty_folder_may_be_written(tmp_path):
    check_output_folder(tmp_path, force=False)


def test_raises_when_the_folder_is_not_empty(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is not empty.*--force"):
        check_output_folder(tmp_path, force=False)


def test_raises_when_what_is_forced_is_no_model_folder(tmp_path, old):
    check_output_folder(old, force=True)
    with pytest.raises(ValueError, match=r"has no config.json: --force replaces model folders only"):
        check_output_folder(tmp_path, force=True)


def test_raises_when_the_folder_is_a_mount_point(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match=r"is a mount point"):
        check_output_folder(tmp_path, force=False)


def test_raises_when_the_folder_is_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is below .*/file, which is a file"):
        check_output_folder(tmp_path / "file" / "deep" / "out", force=False)


def test_raises_when_the_folder_above_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"no permission to write into"):
        check_output_folder(tmp_path / "deep" / "out", force=False)


def test_raises_when_the_folder_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file"):
        check_output_folder(tmp_path / "file", force=True)


@pytest.mark.parametrize("inside", ["", "parent"])
def test_raises_when_a_parent_would_be_overwritten(tmp_path, inside):
    with pytest.raises(ValueError, match=r"would be overwritten"):
        check_parents_survive(tmp_path, [tmp_path / inside])


def test_raises_when_a_parents_file_is_a_link_into_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out" / "weights")
    with pytest.raises(ValueError, match=r"would be overwritten"):
        check_parents_survive(tmp_path / "out", [tmp_path / "link"])


def test_raises_when_the_disk_cannot_hold_it(tmp_path):
    with pytest.raises(ValueError, match=r"GB free"):
        check_space(tmp_path / "not" / "there", 10**18)
