import os

import pytest

from sft_kernels.sft import whole


def fill_with(text):
    return lambda folder: (folder / "file").write_text(text)


def test_a_folder_is_there_in_whole_or_not_at_all(tmp_path):
    def fail(folder):
        (folder / "file").write_text("half")
        raise OSError("full")

    path = tmp_path / "new" / "model"
    with pytest.raises(OSError, match="full"):
        whole.write(path, fail)
    assert not path.exists()
    whole.clear_up(path)
    whole.write(path, fill_with("one"))
    with pytest.raises(FileExistsError, match="exists already"):
        whole.write(path, fill_with("two"))
    with pytest.raises(OSError, match="full"):
        whole.write(path, fail, replace=True)
    assert (path / "file").read_text() == "one"
    whole.write(path, fill_with("two"), replace=True)  # also over what the failure left
    assert (path / "file").read_text() == "two"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("new_there", [False, True])
def test_what_a_kill_between_the_renames_leaves_is_put_right(new_there, tmp_path):
    path = tmp_path / "best"
    whole.write(whole.replaced(path), fill_with("old"))
    if new_there:
        whole.write(path, fill_with("new"))
    else:
        whole.write(whole.partial(path), fill_with("new"))
    whole.clear_up(path)
    assert (path / "file").read_text() == ("new" if new_there else "old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]
    whole.recover(path)
    assert (path / "file").read_text() == ("new" if new_there else "old")


def test_modes_are_the_umasks_and_links_are_left_alone(tmp_path):
    before = os.umask(0o027)
    try:
        whole.write(tmp_path / "model", lambda folder: (folder / "file").touch(mode=0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "file").stat().st_mode & 0o777 == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(FileExistsError, match="is a link"):
        whole.remove(tmp_path / "link")
    assert (tmp_path / "model" / "file").exists()
