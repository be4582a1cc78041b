"""Files are written whole or not at all, and errors say which."""

import contextlib
import errno
import pathlib

import pytest

from keras_memory import files
from keras_memory.files import atomic_write
from keras_memory.files import atomic_write_all
from keras_memory.files import explain_os_errors

resource = pytest.importorskip("resource")


@contextlib.contextmanager
def files_of_at_most(size):
    """Imitates a disk that is full after `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_is_reported_and_keeps_the_old_file(old, tmp_path):
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError) as caught, files_of_at_most(10):
        with atomic_write(path) as aside:
            aside.write_bytes(b"new" * 100)
    assert caught.value.errno == errno.EFBIG
    assert f"Could not write {path}: File too large. " in str(caught.value)
    assert str(caught.value).endswith("Nothing was changed.")
    assert sorted(tmp_path.iterdir()) == before
    assert not old or path.read_bytes() == old


def test_a_missing_folder_is_reported(tmp_path):
    path = tmp_path / "none" / "a.bin"
    with pytest.raises(FileNotFoundError, match=f"Could not write {path}: No"):
        with atomic_write(path) as aside:
            aside.write_bytes(b"new")
    path = tmp_path / "file" / "a.bin"
    pathlib.Path(tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Could not write.*Nothing w"):
        with atomic_write(path) as aside:
            aside.write_bytes(b"new")


def test_errors_are_explained_and_keep_their_type():
    with pytest.raises(PermissionError, match="write it: Permission denied. N"):
        with explain_os_errors("it"):
            raise OSError(errno.EACCES, "Permission denied", "a file")
    with pytest.raises(OSError, match="^Could not write it: bad chunk. Half.$"):
        with explain_os_errors("it", kept="Half."):
            raise OSError("bad chunk")
    with pytest.raises(KeyError, match="other"):
        with explain_os_errors("it"):
            raise KeyError("other")
    with pytest.raises(OSError, match="^Could not write it: no room. Nothing"):
        with explain_os_errors("it", also=(RuntimeError,)):
            raise RuntimeError("no room")
    with pytest.raises(OSError) as caught:
        with explain_os_errors("all"), explain_os_errors("a part"):
            raise OSError("no room")
    assert (
        str(caught.value)
        == "Could not write all: no room. Nothing was changed."
    )


@pytest.mark.parametrize("moved", [0, 1])
def test_a_disk_full_during_moves_reports_partly_new_files(
    moved, tmp_path, monkeypatch
):
    """Some files are new then, and the error must say so."""
    (tmp_path / "0.txt").write_text("old")
    replace, calls = files._replace, []

    def full(source, target):
        calls.append(target)
        if len(calls) > moved:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files, "_replace", full)
    with pytest.raises(
        OSError, match="No space .*Some of its files may be new"
    ):
        with atomic_write_all(tmp_path) as aside:
            for number in range(2):
                (aside / f"{number}.txt").write_text("new")
    assert (tmp_path / "0.txt").read_text() == ("new" if moved else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["0.txt"]
