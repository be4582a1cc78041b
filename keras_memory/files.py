"""Files that are whole or not there."""

import contextlib
import os


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
