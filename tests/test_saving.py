"""Files and folders are there whole or not at all. What leaks is looked for in test_push_to_hub.py."""

import pytest

from modeling_mmgpt.saving.whole import check_free, whole


def test_a_file_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "scores.json"
    for text in ("one", "two"):
        with whole(path) as unfinished:
            unfinished.write_text(text)
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), whole(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_a_folder_appears_whole_and_takes_no_other_ones_place(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(OSError, match="disk"), whole(path) as unfinished:
        unfinished.mkdir()
        (unfinished / "weights").write_text("half")
        raise OSError("No space left on the disk")
    assert not list(tmp_path.iterdir())
    path.mkdir()
    check_free(path)
    for contents in ("first", "second"):
        try:
            with whole(path) as unfinished:
                unfinished.mkdir()
                (unfinished / contents).touch()
        except OSError:
            assert contents == "second"
    assert [file.name for file in path.iterdir()] == ["first"] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="give a new folder"):
        check_free(path)
