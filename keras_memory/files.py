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
    """Keeps other processes out, until the end or the death of this one.

    Args:
        path: `pathlib.Path` of a file that is there.

    Raises:
        ValueError: another process holds it.
    """
    with open(path) as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    "Only one process at a time can work in a folder. "
                    f"Received: {path.parent}, where another one does"
                ) from None
        yield
