"""Atomic writes, locks, and errors that name the file."""

import contextlib
import errno
import os
import pathlib
import shutil
import time
import weakref

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TRIES, PAUSE = 100, 0.1  # tries to rename on Windows, and seconds in between


def check_path(name, value):
    """Returns a `pathlib.Path`; ValueError unless `value` is a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(
            f"`{name}` must be a path, a str or pathlib.Path. "
            f"Received: {name}={value!r}"
        )
    return pathlib.Path(value)


def check_run_folder(folder):
    """Returns the path of a run folder; ValueError unless it is one."""
    folder = check_path("folder", folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            "A run folder must have a config.json, which training writes. "
            f"Received: {folder}, which has none"
        )
    return folder


def check_new_folder(folder):
    """Returns the path of a folder; ValueError unless it is absent or empty."""
    folder = check_path("folder", folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"A run needs a folder. Received: {folder}, a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            "A run needs a new or empty folder, so that no earlier run is "
            f"lost. Received: {folder}, which has files in it"
        )
    return folder


def fsync(path):
    """Flushes a file, or a folder's list of files, to the disk.

    On Windows it skips folders and read-only files, since Windows flushes only
    files that are open for writing.

    Args:
        path: path of the file or folder.
    """
    writable = os.access(path, os.W_OK) and not os.path.isdir(path)
    if os.name == "nt" and not writable:
        return
    handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path):
    """Makes a folder and its missing parents, and flushes them to the disk, so
    that they survive power loss.

    Args:
        path: `pathlib.Path`.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


@contextlib.contextmanager
def explain_os_errors(what, kept="Nothing was changed.", also=(), verb="write"):
    """Adds the file's name to an OSError, such as that of a full disk.

    Args:
        what: str or path, name of the file that the block writes or reads.
        kept: str, a sentence on the state of the files after an error.
        also: tuple of further exception classes for disk errors, such as
            `tf.errors.OpError`.
        verb: "write" or "read".

    Raises:
        OSError: with the same `errno`, and so of the same class.
    """
    try:
        yield
    except (OSError, *also) as error:
        number, reason = getattr(error, "errno", None), os_reason(error)
        if getattr(error, "sqlite_errorname", None) == "SQLITE_FULL":
            number = errno.ENOSPC
        text = f"Could not {verb} {what}: {reason}. {kept}"
        told = OSError(text) if number is None else OSError(number, text)
        told.reason = reason
        raise told from error


def os_reason(error):
    """The system's reason for an error, also for an error that
    `explain_os_errors` raised."""
    return getattr(error, "reason", getattr(error, "strerror", None)) or error


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, and renames it to `path` at the
    end.

    Readers of `path` find the complete old file or the complete new one, even
    if the writer is killed or the machine loses power. An error leaves the old
    file, and its message says so.

    Args:
        path: `pathlib.Path` of the file.

    Raises:
        OSError: the file cannot be written, or, on Windows, another program
            keeps the old file open for more than ten seconds.
    """
    aside = path.with_name(f".{path.stem}.writing{path.suffix}")
    with explain_os_errors(path):
        try:
            yield aside
            fsync(aside)
            _replace(aside, path)
        finally:
            # Windows cannot remove an open file, which must not hide the first
            # error.
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def _replace(source, target):
    """Renames a file. Windows needs retries while the old file is open."""
    for _ in range(TRIES - 1 if os.name == "nt" else 0):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(PAUSE)
    os.replace(source, target)


@contextlib.contextmanager
def atomic_write_all(folder):
    """Yields an empty folder for new files, and moves them at the end.

    They replace files of the same names in `folder`; other files stay. An error
    while writing, such as that of a full disk, leaves all files as they were.
    An error while moving may leave some new files. The message says which.

    Args:
        folder: `pathlib.Path`; made if absent.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    aside = folder / ".writing"
    try:
        with explain_os_errors(folder):
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed process
            aside.mkdir(parents=True)
            yield aside
            written = sorted(aside.rglob("*"))
            for path in filter(os.path.isfile, written):
                fsync(path)
        message = "Some of its files may be new, the others are as they were."
        with explain_os_errors(folder, kept=message):
            for path in filter(os.path.isdir, written):
                (folder / path.relative_to(aside)).mkdir(exist_ok=True)
            for path in filter(os.path.isfile, written):
                _replace(path, folder / path.relative_to(aside))
            shutil.rmtree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder is not empty
            for path in made:
                path.rmdir()
        raise


def has_locks():
    """Whether the system has locks, so that `locked` excludes others."""
    return fcntl is not None


@contextlib.contextmanager
def locked(path):
    """Holds an exclusive lock on a file until the block ends or the process
    dies.

    Windows has no such lock: there every process enters.

    Args:
        path: `pathlib.Path` of the lock file, made if absent.

    Raises:
        ValueError: another process, or this one, holds the lock.
    """
    owner = os.getpid()
    with open(path, "a") as file:
        _lock_files.add(file)
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    "Only one writer at a time can use a folder. Received: "
                    f"{path.parent}, which is locked by another writer"
                ) from None
        try:
            yield
        finally:
            # In a fork the file is closed, and the parent has the lock.
            if fcntl is not None and os.getpid() == owner:
                fcntl.flock(file, fcntl.LOCK_UN)


# A fork inherits the open files, and would keep the locks of a killed parent.
_lock_files = weakref.WeakSet()


def _close_lock_files():
    for file in list(_lock_files):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_lock_files)
