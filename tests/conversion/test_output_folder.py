import pytest

from modeling_vlmoe.conversion.output_folder import check_output_folder, check_space, whole_or_nothing


def test_the_folder_appears_with_its_content(tmp_path):
    with whole_or_nothing(tmp_path / "deep" / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "deep" / "out").exists()
    assert [file.name for file in (tmp_path / "deep" / "out").iterdir()] == ["file"]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_folder_it_replaces_stays_until_it_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with whole_or_nothing(tmp_path / "out") as folder:
        (folder / "new").touch()
        assert (tmp_path / "out" / "old").exists()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


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
    check_output_folder(tmp_path, force=True)


def test_raises_when_the_folder_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file"):
        check_output_folder(tmp_path / "file", force=True)


@pytest.mark.parametrize("inside", ["", "parent"])
def test_raises_when_a_parent_would_be_overwritten(tmp_path, inside):
    with pytest.raises(ValueError, match=r"would be overwritten"):
        check_output_folder(tmp_path, force=True, parents=[tmp_path / inside])


def test_raises_when_the_disk_cannot_hold_it(tmp_path):
    with pytest.raises(ValueError, match=r"GB free"):
        check_space(tmp_path / "not" / "there", 10**18)
