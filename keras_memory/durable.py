"""The files behind a retrieval memory: what was done to its rows, in a log.

A store is a folder of three files, of which a writer only ever adds to the
second and replaces the first:

`manifest.json`: format, store (a random id), config, log (name of the file),
    length (bytes of it that are committed), operations (their number), crc32.
`log-<number>.bin`: a header, and a block for each operation: `BLOCK`, CRC-32
    of that and of the arrays, keys, values; all little-endian.
`lock`: held by the one writer.

What is behind the committed length is not there for readers, and a writer cuts
it off: it was being written when a process died.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import struct
import uuid
import zlib
from typing import NamedTuple

import numpy as np

from keras_memory.files import locked
from keras_memory.files import os_reason
from keras_memory.files import written_aside

FORMAT = 1
MANIFEST = "manifest.json"
WRITING = ".manifest.writing.json"  # the name that `written_aside` gives it
LOG = re.compile(r"log-([0-9]{1,18})\.bin")
FIELDS = {
    "format": int,
    "store": str,
    "config": dict,
    "log": str,
    "length": int,
    "operations": int,
}
HEADER = struct.Struct("<8sI16sQ")  # magic, format, store, number of the log
HEADER_MAGIC = b"kerasmem"
BLOCK = struct.Struct("<4sIIIIIQ")  # magic, kind, row, n, widths, bytes behind
BLOCK_MAGIC = b"KMop"
CRC = struct.Struct("<I")
CLEAR, ADD = range(2)  # kinds


class Operation(NamedTuple):
    """What is done to a row of a memory: something added, or all cleared.

    Args:
        row: int, from 0 to 2^32 - 1.
        keys: (n, key width) float32 array, or None to clear the row.
        values: (n, value width) float32 array; None where `keys` is.
    """

    row: int
    keys: np.ndarray | None
    values: np.ndarray | None


class Log:
    """The operations that a folder holds, to read and to add to.

    Any number of readers may be beside one writer. A reader sees what was
    committed when it opened or last refreshed, and nothing that was not.

    Example:

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log = Log(folder.name, "a", config={"key_width": 3})
    >>> keys, values = np.ones((2, 3), "f4"), np.ones((2, 0), "f4")
    >>> log.append([Operation(0, keys, values), Operation(1, None, None)])
    >>> log.close()
    >>> log = Log(folder.name, "r")
    >>> [operation.row for operation in log.operations()]
    [0, 1]
    >>> log.close()
    >>> folder.cleanup()

    Args:
        folder: path of the store.
        mode: "r" to read, which takes no lock and writes nothing; "a" to
            write, which makes folder and store where there are none, and
            holds the lock until `close` or the death of the process.
        config: dict for JSON that a new store is to have, or that the one
            there must have; None for any.

    Attributes:
        config: dict, as it is stored.
        size: bytes of the log, with what is appended and not yet flushed.

    Raises:
        ValueError: another config, another writer, or files that are damaged,
            of a newer format or not of this store. They stay as they are.
        FileNotFoundError: no store to read, or a file of it is missing.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder, mode, config=None):
        if mode not in ("a", "r"):
            raise ValueError(
                '`mode` must be "r" to read or "a" to write. '
                f"Received: mode={mode!r}"
            )
        self._folder = folder = pathlib.Path(folder).absolute()
        self._mode = mode
        self._owner = os.getpid()
        self._broken = None  # or why nobody knows what is on the disk
        config = None if config is None else _as_stored(config)
        with contextlib.ExitStack() as held:
            if mode == "a":
                held.enter_context(_made_and_locked(folder, config))
            self._take(*_open(folder, mode))
            held.callback(self._file.close)
            if config is not None:
                _check_config(folder, config, self.config)
            if mode == "a":
                _sync_folder(folder)  # who wrote before may have been killed
                _remove_strays(folder, self._manifest)
                self._file.truncate(self.size)
            self._held = held.pop_all()

    def _take(self, manifest, file):
        self._manifest, self._file = manifest, file
        self._path = self._folder / manifest["log"]
        self.config = manifest["config"]
        self.size, self._appended = manifest["length"], manifest["operations"]
        self._read, self._given = HEADER.size, 0

    def operations(self):
        """Reads on, one operation at a time.

        Yields:
            `Operation`s that are committed and were not yet read from this
            log; at first all, and from the first again after a rewrite.

        Raises:
            ValueError: the log is damaged.
        """
        self._check_open()
        while self._read < self._manifest["length"]:
            operation, end = _read_block(
                self._file, self._path, self._read, self._manifest["length"]
            )
            self._read, self._given = end, self._given + 1
            yield operation
        if self._given != self._manifest["operations"]:
            raise ValueError(
                f"{self._path} must have {self._manifest['operations']} "
                "operations, which its manifest tells, or one of both is "
                f"another's. Received: {self._given}"
            )

    def refresh(self):
        """Looks for what a writer has committed since.

        Returns:
            None if nothing; "more" if `operations` goes on; "anew" if the log
            was written anew, and `operations` begins with its first.

        Raises:
            ValueError, FileNotFoundError: as at opening, or the store is now
                one of another config. What was read before stays readable.
        """
        self._check_open("r")
        before = self._manifest
        if _read_manifest(self._folder) == before:
            return None
        with contextlib.ExitStack() as held:
            manifest, file = _open(self._folder, "r")
            held.callback(file.close)
            _check_config(self._folder, before["config"], manifest["config"])
            same = all(manifest[n] == before[n] for n in ("store", "log"))
            if same and manifest["length"] < self.size:
                raise ValueError(
                    f"{self._path} must grow, or what was read is not in it. "
                    f"Received: {manifest['length']} bytes after {self.size}"
                )
            held.pop_all()
        self._file.close()
        place = self._read, self._given
        self._take(manifest, file)
        if same:
            self._read, self._given = place
        return "more" if same else "anew"

    def append(self, operations):
        """Writes operations behind the others; not yet acknowledged.

        Args:
            operations: iterable of `Operation`.

        Raises:
            ValueError: one is no operation. None of them is written.
            OSError: no room, or another reason. None of them is written.
        """
        self._check_usable()
        try:
            with _told(f"append to {self._path}", "it is as it was"):
                self._file.seek(self.size)
                size, number = _write_blocks(self._file, operations)
        except BaseException:
            with contextlib.suppress(OSError):  # the next one writes over it
                self._file.truncate(self.size)
            raise
        self.size, self._appended = self.size + size, self._appended + number

    def flush(self):
        """Commits what was appended: readers see it, and it survives the death
        of the process and loss of power.

        Raises:
            OSError: no room, or another reason. What was appended still waits
                to be flushed. If the error says that the log must be opened
                anew, what was appended since the last flush may be lost.
        """
        self._check_usable()
        if self.size == self._manifest["length"]:
            return
        new = {"length": self.size, "operations": self._appended}
        manifest = {**self._manifest, **new}
        with self._synced():
            _sync(self._file)
        self._check_own()
        with _told(f"flush {self._path}", "what was appended still waits"):
            _commit(self._folder, manifest)
        self._manifest = manifest
        with self._synced():
            _sync_folder(self._folder)

    def rewrite(self, operations):
        """Commits other operations instead of all, in a new file.

        Args:
            operations: iterable of `Operation`, which may read this log.

        Raises:
            ValueError, OSError: as `append` and `flush`. The old log stays,
                unless the error says that it must be opened anew.
        """
        self._check_usable()
        self._check_own()
        before = self._manifest
        self._broken = "a rewrite that was interrupted"
        try:
            with _told(f"rewrite {self._path}", "it is as it was"):
                _write_store(
                    self._folder, before["store"], before["config"], operations
                )
        except BaseException:
            if _named_in(self._folder, "log") == before["log"]:
                self._broken = None
            raise
        with self._synced():
            _sync_folder(self._folder)
        old = self._file
        self._take(*_open(self._folder, "a"))
        self._broken = None
        old.close()
        _remove_strays(self._folder, self._manifest)

    def close(self):
        """Flushes, and lets other writers in; does nothing the second time.

        Raises:
            OSError: as `flush`. The log is still open then.
        """
        if self._file.closed:
            return
        is_own = self._owner == os.getpid()
        if self._mode == "a" and self._broken is None and is_own:
            self.flush()
        self._file.close()
        self._held.close()

    def _check_own(self):
        """Raises OSError if the folder holds another store by now."""
        if _named_in(self._folder, "store") != self._manifest["store"]:
            raise OSError(
                errno.ESTALE,
                f"{self._folder} must still hold the store that was opened, or "
                "another would be lost. Received: another, or none",
            )

    def _check_open(self, mode=None):
        if self._owner != os.getpid():
            raise ValueError(
                "A log must be used by the process that opened it, as forks "
                "would write over each other: open it anew, or before there "
                f"are others. Received: {self._folder}, opened by process "
                f"{self._owner}, in process {os.getpid()}"
            )
        if self._file.closed or mode not in (None, self._mode):
            raise ValueError(
                f"This must be asked of an open log, of mode {mode or 'any'}. "
                f"Received: {self._folder}, mode {self._mode}"
                + (", closed" if self._file.closed else "")
            )

    def _check_usable(self):
        self._check_open("a")
        if self._broken is not None:
            raise OSError(
                errno.EIO,
                f"It must be known what of {self._path} is on the disk: close "
                f"it and open it anew. Received before: {self._broken}",
            )

    @contextlib.contextmanager
    def _synced(self):
        """Breaks the log where it did not come to the disk: the system forgets
        what did not, and the next try would succeed without it."""
        try:
            yield
        except OSError as error:
            self._broken = error.strerror or str(error)
            raise OSError(
                error.errno,
                f"{self._path} must come to the disk to be committed, and it "
                "is not known whether it did: close it and open it anew. "
                f"Received: {self._broken}",
            ) from error


def write(folder, config, operations):
    """Writes a whole store, in the place of the one that may be there.

    A reader, or who comes after a killed process, finds the old one or the new.

    Args:
        folder: path; is made if it is not there.
        config: dict for JSON.
        operations: iterable of `Operation`.

    Raises:
        ValueError: a writer has the old one open, or arguments of other kinds.
        OSError: no room, or another reason. The old one stays.
    """
    folder, config = pathlib.Path(folder), _as_stored(config)
    _make_folder(folder)
    with locked(folder / "lock"):
        with _told(f"write a store to {folder}", "what is there is as it was"):
            manifest = _write_store(folder, _new_id(), config, operations)
        _sync_folder(folder)
        _remove_strays(folder, manifest)


def exists(folder):
    """True if there is a store in the folder, whole or damaged."""
    return (pathlib.Path(folder) / MANIFEST).exists()


def _new_id():
    return uuid.uuid4().hex


@contextlib.contextmanager
def _made_and_locked(folder, config):
    """Holds the lock of a store, which is made where there is none."""
    if config is None and not exists(folder):
        raise ValueError(
            "A new store needs a `config`, by which it is known later. "
            f"Received: config=None, and no store in {folder}"
        )
    _make_folder(folder)
    with locked(folder / "lock"):
        if not exists(folder):
            if _logs(folder) and not (folder / WRITING).exists():
                raise _missing(folder / MANIFEST)
            with _told(f"make a store in {folder}", "there is none"):
                _write_store(folder, _new_id(), config, [])
        yield


def _as_stored(config):
    """The dict that JSON makes of a config."""
    try:
        if isinstance(config, dict):
            return json.loads(json.dumps(config, allow_nan=False))
        reason = type(config).__name__
    except (TypeError, ValueError, RecursionError) as error:
        reason = error
    raise ValueError(
        "`config` must be a dict of what JSON can hold, since it is kept in "
        f"{MANIFEST}. Received: {reason}"
    )


def _check_config(folder, wanted, stored):
    def shown(name):
        both = [config.get(name, "none") for config in (wanted, stored)]
        return "{}={!r} (stored: {!r})".format(name, *both)

    missing = object()
    differing = [
        shown(name)
        for name in {**stored, **wanted}
        if wanted.get(name, missing) != stored.get(name, missing)
    ]
    if differing:
        raise ValueError(
            f"{folder} must be used with the config that it was made with, "
            f"since its content fits no other. Received: {', '.join(differing)}"
        )


def _checksum(content):
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _commit(folder, manifest):
    with written_aside(folder / MANIFEST) as path:
        text = json.dumps({**manifest, "crc32": _checksum(manifest)}, indent=1)
        with open(path, "wb", buffering=0) as file:
            _write(file, text.encode())


def _read_manifest(folder):
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        version = content.get("format")
        if type(version) is int and version > FORMAT:
            raise ValueError(f"format {version}, of a newer keras_memory")
        if content.pop("crc32", None) != _checksum(content):
            raise ValueError("another checksum")
        if {name: type(content[name]) for name in content} != FIELDS:
            raise ValueError(f"entries {', '.join(content)}")
        if version != FORMAT or not LOG.fullmatch(content["log"]):
            raise ValueError(f"format {version}, log {content['log']}")
    except FileNotFoundError:
        raise _missing(path) from None
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a manifest of format {FORMAT}, as it was written, "
            f"or it is not known what the store holds. Received: {error}"
        ) from None
    return content


def _missing(path):
    return FileNotFoundError(
        "A store needs its manifest, and the log that the manifest names, or "
        f"there is none to read. Received: {path}, which is not there"
    )


def _named_in(folder, what):
    """The log that counts, say, or the store, or None."""
    try:
        return _read_manifest(folder)[what]
    except (FileNotFoundError, ValueError):
        return None


def _logs(folder):
    """The log files of a folder, by their numbers."""
    found = [(LOG.fullmatch(path.name), path) for path in folder.iterdir()]
    return {int(match[1]): path for match, path in found if match}


def _header(manifest):
    store = bytes.fromhex(manifest["store"])
    number = int(LOG.fullmatch(manifest["log"])[1])
    return HEADER.pack(HEADER_MAGIC, FORMAT, store, number)


def _open(folder, mode):
    """The manifest, and the log that it names, open."""
    before = None
    while True:
        manifest = _read_manifest(folder)
        path, length = folder / manifest["log"], manifest["length"]
        try:
            # Without buffers: what they hold may be cut and written over.
            file = open(path, "r+b" if mode == "a" else "rb", buffering=0)
            break
        except FileNotFoundError:  # a writer may have put another there
            if manifest == before:
                raise _missing(path) from None
            before = manifest
    try:
        size = os.fstat(file.fileno()).st_size
        if not HEADER.size <= length <= size:
            raise ValueError(
                f"{path} must have the {length} bytes that its manifest tells, "
                f"or some of it is lost. Received: {size} bytes"
            )
        header = bytes(_read(file, path, 0, HEADER.size))
        if header != _header(manifest):
            _, version, store, number = HEADER.unpack(header)
            raise ValueError(
                f"{path} must begin as a log of format {FORMAT}, of the store "
                f"{manifest['store']} and of the number in its name, or it is "
                f"damaged or another's. Received: {header[:8]}, format "
                f"{version}, store {store.hex()}, number {number}"
            )
    except BaseException:
        file.close()
        raise
    return manifest, file


def _read(file, path, offset, size):
    """(size,) bytes."""
    data = np.empty(size, np.uint8)
    file.seek(offset)
    done = 0
    while done < size:
        read = file.readinto(data[done:])
        if not read:
            raise ValueError(
                f"{path} must have {size} bytes at byte {offset}, or some of "
                f"it is lost. Received: {done} bytes"
            )
        done += read
    return data


def _read_block(file, path, offset, end):
    """An operation, and where the next one begins."""

    def check(good, what):
        if not good:
            raise ValueError(
                f"{path} must be as it was written, or the memory would not "
                f"be what it was. Received: at byte {offset}, {what}"
            )

    left = end - offset - BLOCK.size - CRC.size
    check(left >= 0, f"only {end - offset} bytes of a block")
    head = _read(file, path, offset, BLOCK.size + CRC.size)
    magic, kind, row, n, *widths, size = BLOCK.unpack_from(head)
    (crc,) = CRC.unpack_from(head, BLOCK.size)
    # Before it is read: a damaged size must not ask for a terabyte.
    known = magic == BLOCK_MAGIC and kind in (CLEAR, ADD)
    check(known, f"no block, but {magic} {kind}")
    fits = size == 4 * n * sum(widths) and size <= left
    check(fits, f"{size} bytes for {n} rows of {widths} where {left} are left")
    payload = _read(file, path, offset + len(head), size)
    found = zlib.crc32(payload, zlib.crc32(head[: BLOCK.size]))
    check(found == crc, f"a block of checksum {found} instead of {crc}")
    end = offset + len(head) + size
    if kind == CLEAR:
        return Operation(row, None, None), end
    floats = payload.view("<f4").astype(np.float32, copy=False)
    arrays = np.split(floats, [n * widths[0]])
    keys, values = (a.reshape(n, w) for a, w in zip(arrays, widths))
    return Operation(row, keys, values), end


def _block(operation):
    """The parts of a block."""
    row, keys, values = operation
    arrays = [] if keys is None and values is None else [keys, values]
    try:
        n = len(keys) if arrays else 0
        widths = [array.shape[1] for array in arrays] or (0, 0)
        for array, width in zip(arrays, widths):
            if array.shape != (n, width) or array.dtype != np.float32:
                raise TypeError
        kind, size = ADD if arrays else CLEAR, 4 * n * sum(widths)
        block = BLOCK.pack(BLOCK_MAGIC, kind, row, n, *widths, size)
    except (AttributeError, IndexError, TypeError, struct.error):
        shown = [
            f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else repr(x)
            for x in operation
        ]
        raise ValueError(
            "An operation must have a row from 0 to 2^32 - 1, and float32 "
            "arrays of keys and values of (n, width) each, or None for both, "
            "since it is stored so. Received: {}, {}, {}".format(*shown)
        ) from None
    arrays = [np.ascontiguousarray(array, "<f4") for array in arrays]
    crc = zlib.crc32(block)
    for array in arrays:
        crc = zlib.crc32(array, crc)
    return block, CRC.pack(crc), *arrays


def _write(file, *parts):
    """Writes all of the parts, and gives the number of their bytes."""
    parts = [memoryview(part) for part in parts]
    for part in parts:
        part = part.cast("B") if part.nbytes else b""
        while part:
            part = part[os.write(file.fileno(), part) :]
    return sum(part.nbytes for part in parts)


def _write_blocks(file, operations):
    """Writes operations, and gives the bytes and the number of them."""
    size = number = 0
    for operation in operations:
        size += _write(file, *_block(operation))
        number += 1
    return size, number


def _write_store(folder, store, config, operations):
    """Writes a new log, and commits the manifest that makes it count."""
    log = f"log-{max(_logs(folder), default=0) + 1}.bin"
    manifest = {"format": FORMAT, "store": store, "config": config, "log": log}
    try:
        if not exists(folder):
            # Beside logs this says that no manifest was lost, but the first
            # one was being written; it becomes that one.
            (folder / WRITING).touch()
            _sync_folder(folder)
        with open(folder / log, "xb", buffering=0) as file:
            _write(file, _header(manifest))
            size, number = _write_blocks(file, operations)
            _sync(file)
        _sync_folder(folder)  # or power may fail with the manifest alone there
        manifest.update(length=HEADER.size + size, operations=number)
        _commit(folder, manifest)
    except BaseException:
        if _named_in(folder, "log") != log:
            (folder / log).unlink(missing_ok=True)
            (folder / WRITING).unlink(missing_ok=True)
        raise
    return manifest


def _remove_strays(folder, manifest):
    """Removes what interrupted writes have left, and logs that were replaced.

    What cannot be removed, since on Windows a reader has it open, is left to
    the next writer.
    """
    for path in [folder / WRITING, *_logs(folder).values()]:
        if path.name != manifest["log"]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _make_folder(folder):
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync(file):
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def _sync_folder(folder):
    if os.name == "nt":  # knows no such thing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(wanted, still):
    """Says of an error what was wanted, and that nothing is lost by it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"To {wanted}, its disk must have room and work; {still}. "
            f"Received: {os_reason(error)}",
        ) from error
