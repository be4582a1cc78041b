"""Files that are whole or not there, and written by one process."""

import contextlib
import os
import shutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def explain_os_errors(what, kept="Nothing was changed.", also=()):
    """Says in the errors of a full disk, say, what was being written.

    Args:
        what: str or path of what is written inside of this.
        kept: str, what is left after an error.
        also: tuple of further classes of exceptions that tell of the disk,
            such as `tf.errors.OpError`.

    Raises:
        OSError: of the same `errno`, and so of the same class.
    """
    try:
        yield
    except (OSError, *also) as error:
        number, reason = getattr(error, "errno", None), os_reason(error)
        text = f"Could not write {what}: {reason}. {kept}"
        told = OSError(text) if number is None else OSError(number, text)
        told.reason = reason
        raise told from error


def os_reason(error):
    """Why: what the system said, also of an error that says more by now."""
    return getattr(error, "reason", getattr(error, "strerror", None)) or error


@contextlib.contextmanager
def written_aside(path):
    """Gives a path beside `path` to write to, and renames it at the end.

    Whoever reads `path` finds the old file or the new one, whole, also if the
    writer is killed or the machine loses power. An error leaves the old one,
    and says so.

    Args:
        path: `pathlib.Path` of the file.
    """
    aside = path.with_name(f".{path.stem}.writing{path.suffix}")
    with explain_os_errors(path):
        try:
            yield aside
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def files_written_aside(folder):
    """Gives an empty folder to write files to, and moves them at the end.

    They take the place of files of the same names in `folder`; others stay. An
    error, such as that of a full disk, leaves all as it was, and says so.

    Args:
        folder: `pathlib.Path`; made where it is absent.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    aside = folder / ".writing"
    with explain_os_errors(folder):
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a killed process
            aside.mkdir(parents=True)
            yield aside
            written = sorted(aside.rglob("*"))
            for path in filter(os.path.isdir, written):
                (folder / path.relative_to(aside)).mkdir(exist_ok=True)
            for path in filter(os.path.isfile, written):
                os.replace(path, folder / path.relative_to(aside))
            shutil.rmtree(aside)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(OSError):  # one that is not empty
                for path in made:
                    path.rmdir()
            raise


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
