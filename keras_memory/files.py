"""Files that are whole or not there, and written by one process."""

import contextlib
import os

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def written_aside(path):
    """Gives a path beside `path` to write to, and renames it at the end.

    Whoever reads `path` finds the old file or the new one, whole, also if the
    writer is killed or the machine loses power. An error leaves the old one.

    Args:
        path: `pathlib.Path` of the file.
    """
    aside = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path):
    """Keeps others out, until the end of this or the death of the process.

    Windows has no such lock: there all may enter.

    Args:
        path: `pathlib.Path` of a file, which is made where there is none.

    Raises:
        ValueError: it is locked, by another process or in this one.
    """
    owner = os.getpid()
    with open(path, "a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    "Only one process at a time, and only once, can work in a "
                    f"folder. Received: {path.parent}, where one does already"
                ) from None
        try:
            yield
        finally:
            # A fork has the file too, and would keep the lock, or give it up.
            if fcntl is not None and os.getpid() == owner:
                fcntl.flock(file, fcntl.LOCK_UN)
