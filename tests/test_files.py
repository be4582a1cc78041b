"""Files are written whole or not at all, on every system."""

import errno
import os
import stat

import numpy as np
import pytest

from keras_memory import files
from keras_memory.retrieval import store

fcntl = pytest.importorskip("fcntl", reason="asks how files are open")


class Windows:
    """Imitates `os` on Windows: folders cannot be opened, only files open for
    writing can be flushed, and open files cannot be replaced or removed."""

    name = "nt"
    O_RDONLY, O_RDWR = os.O_RDONLY, os.O_RDWR

    def __init__(self):
        self.flushed, self.kept_open = [], {}

    def __getattr__(self, name):
        if name in ("fork", "register_at_fork", "fdatasync", "O_DIRECTORY"):
            raise AttributeError(name)
        return getattr(os, name)

    def open(self, path, *flags):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os.open(path, *flags)

    def fsync(self, descriptor):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        os.fsync(descriptor)
        self.flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def replace(self, source, target):
        if self.kept_open.get(target, 0) > 0:
            self.kept_open[target] -= 1
            raise PermissionError(errno.EACCES, "Access is denied", target)
        os.replace(source, target)


@pytest.fixture
def windows(monkeypatch):
    system = Windows()
    for module in (files, store):
        monkeypatch.setattr(module, "os", system)
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(files, "PAUSE", 0.0)
    return system


needs_proc = pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="looks up what was flushed"
)


@needs_proc
def test_files_are_written_on_windows(windows, tmp_path):
    path = tmp_path / "file.txt"
    for text in ("old", "new"):
        with files.atomic_write(path) as aside:
            aside.write_text(text)
        assert path.read_text() == text
    assert windows.flushed == [str(tmp_path / ".file.writing.txt")] * 2
    files.fsync(tmp_path)  # skips folders
    files.fsync(path)
    assert windows.flushed[2:] == [str(path)]
    assert os.listdir(tmp_path) == ["file.txt"]


@needs_proc
def test_stores_are_written_on_windows(windows, tmp_path):
    keys, values = np.ones((2, 3), "f4"), np.ones((2, 0), "f4")
    operation = store.Operation(0, keys, values)
    one = store.Store(tmp_path / "new" / "store", "a", {}, [operation])
    one.commit([operation])
    one.close()
    one = store.Store(tmp_path / "new" / "store", "r")
    assert len(list(one.operations(3, 0, "f4"))) == 3
    one.close()


@needs_proc
def test_a_write_on_windows_waits_for_readers(windows, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    windows.kept_open[path] = 3
    with files.atomic_write(path) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"
    windows.kept_open[path] = 1000
    with pytest.raises(PermissionError, match="file.txt: Access is denied"):
        with files.atomic_write(path) as aside:
            aside.write_text("newer")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_write_elsewhere_does_not_wait(monkeypatch, tmp_path):
    asked = []

    def refused(*paths):
        asked.append(paths)
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError, match="no"):
        with files.atomic_write(tmp_path / "file.txt") as aside:
            aside.write_text("text")
    assert len(asked) == 1
    assert os.listdir(tmp_path) == []


def test_the_error_of_the_writer_is_raised(monkeypatch, tmp_path):
    """Even if its temporary file cannot be removed."""

    def refused(*arguments, **options):
        raise PermissionError("it is open")

    monkeypatch.setattr(type(tmp_path), "unlink", refused)
    with pytest.raises(ZeroDivisionError):
        with files.atomic_write(tmp_path / "file.txt") as aside:
            aside.write_text(str(1 / 0))


def test_read_only_files_are_flushed_too(monkeypatch, tmp_path):
    path = tmp_path / "asset.txt"
    path.write_text("words")
    path.chmod(stat.S_IRUSR)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root
    files.fsync(path)
