"""The entries of a memory on a disk, in one SQLite file.

A store is a folder with `memory.sqlite` and `lock`, which its one writer holds
locked. SQLite keeps the last transactions in `memory.sqlite-wal`, and an index
of them in `memory.sqlite-shm`, while it is in use and after a kill. Tables:

`meta`, one row: config, JSON; first and last, numbers of operations; crc,
    CRC-32 of these three.
`operations`, a row for each number from first to last: row of the memory; count
    of entries added to it, or 0 where it is cleared; crc, CRC-32 of number,
    row, count and bytes; keys and vals, the bytes of two arrays. The first
    operation clears all rows; its row is -1.

SQLite does not check its pages: a changed operation has another checksum, a
lost one leaves out a number. Damage to `memory.sqlite-wal` reads as interrupted
transactions, as never committed: each commit is copied from it into the file.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import sqlite3
import time
import zlib

import numpy as np

from keras_memory import files

NAME = "memory.sqlite"
# "KMem" and format 2, since 1 was a log. auto_vacuum, first, gives space back.
IDENTITY = {"auto_vacuum": 1, "application_id": 0x4B4D656D, "user_version": 2}
SCHEMA = (
    "CREATE TABLE meta (config TEXT, first INTEGER, last INTEGER, crc INTEGER);"
    "CREATE TABLE operations (number INTEGER PRIMARY KEY, row INTEGER, "
    "count INTEGER, crc INTEGER, keys BLOB, vals BLOB)"
)
# Bytes of another length than is expected are not read, and take no memory.
SELECT = """SELECT row, count, crc, keys, vals FROM operations WHERE
    number = ? AND length(keys) = count * ? AND length(vals) = count * ?"""

# `keys` and `values`, (n, width) arrays, are added to `row`, an int. Without
# entries the row is cleared, or, where it is -1, all rows.
Operation = collections.namedtuple("Operation", "row keys values")
Meta = collections.namedtuple("Meta", "config first last")


class Store:
    """The operations in a folder, for one writer and any number of readers.

    One thread at a time may use a store, and none may fork a process meanwhile.

    Args:
        folder: path of the store.
        mode: "r" to read, without a lock; "a" to write, which makes a store
            where there is none, and holds the lock until `close`.
        config: dict for JSON, of a store that is made or replaced.
        operations: iterable of `Operation`s that replace all; None for none.

    Raises:
        ValueError: another writer, or a file that is damaged, or of another
            format or program. It stays as it is.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder, mode, config=None, operations=None):
        self.path = pathlib.Path(folder).absolute() / NAME
        self.owner, self.config, self._read = os.getpid(), config, 0
        self._meta, self._connection, self._mode = None, None, mode
        with contextlib.ExitStack() as held:
            if mode == "a":
                files.make_folder(self.path.parent)
                if not os.access(self.path.parent, os.W_OK):
                    raise PermissionError(f"Write denied: {self.path.parent}")
                held.enter_context(files.locked(self.path.with_name("lock")))
            if not exists(folder) and mode == "a":
                _create(self.path, json.dumps(config), operations or ())
                operations = None
            with self._reading() as connection:
                if mode == "a":  # on damaged pages it could damage others
                    told = _pragma(connection, "quick_check(1)")
                    _check(told == "ok", told)
                    files.fsync(self.path.parent)  # a kill may have left it
            if operations is not None:
                self.commit(operations, replace=True)
            self.config = json.loads(self._meta.config)
            self._held = held.pop_all()

    def operations(self, key_dim, value_dim, value_dtype):
        """Yields `Operation`s that are committed and were not yet read, with
        float32 keys, or a ValueError where the file is damaged or another one.
        Those of a call that was not finished come again.
        """
        kinds = (
            np.dtype(("f4", (key_dim,))),
            np.dtype((value_dtype, (value_dim,))),
        )
        sizes = [kind.itemsize for kind in kinds]
        with self._reading() as connection:
            begin = max(self._read + 1, self._meta.first)
            for number in range(begin, self._meta.last + 1):
                found = connection.execute(SELECT, (number, *sizes)).fetchone()
                row, count, crc, *blobs = found or [None] * 5
                types = [type(field) for field in (row, count, *blobs)]
                right = types == [int, int, bytes, bytes]
                right = right and crc == _checksum((number, row, count), *blobs)
                _check(right, f"operation {number}: another size or checksum")
                arrays = map(np.ndarray, (count, count), kinds, blobs)
                yield Operation(row, *arrays)
        self._read = self._meta.last

    def commit(self, operations, replace=False):
        """Adds an iterable of `Operation`s, or replaces all, in a transaction:
        readers see all of it or nothing, and it survives kills and loss of
        power. After an OSError nothing has changed."""
        self._check_owner()
        if self._mode != "a":
            raise ValueError(f"A store must be open to write. Got: {self.path}")
        config = json.dumps(self.config) if replace else None
        with _explained("write", self.path), contextlib.ExitStack() as undo:
            undo.callback(self.disconnect)  # which rolls back
            if self._connection is None:
                self._connection = _connect(self.path, "rw")
                self._connection.execute("PRAGMA synchronous=FULL")
                self._inode = os.stat(self.path).st_ino
            _pragma(self._connection, "busy_timeout=5000")
            self._connection.execute("BEGIN IMMEDIATE")
            found = _read_meta(self._connection), os.stat(self.path).st_ino
            if found != (self._meta, self._inode):
                raise OSError("another store is there; open this one anew")
            meta = _write(self._connection, self._meta, operations, config)
            self._connection.execute("COMMIT")
            self._meta = meta
            undo.pop_all()
        # Into the file, whose damage is seen, as far as readers let it.
        with contextlib.suppress(sqlite3.Error):
            _pragma(self._connection, "busy_timeout=0")
            _pragma(self._connection, "wal_checkpoint(TRUNCATE)")

    def disconnect(self):
        """Closes the connection to the file, until the next commit."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self):
        """Lets other writers in."""
        self.disconnect()
        self._mode = "closed"
        self._held.close()

    @contextlib.contextmanager
    def _reading(self):
        """A connection in a transaction, of which `_meta` tells."""
        self._check_owner()
        os.stat(self.path)  # raises a plain FileNotFoundError
        with _explained("read", self.path):
            with contextlib.closing(_connect(self.path, "ro")) as connection:
                connection.execute("BEGIN")
                new = _read_meta(connection)
                old = self._meta or new
                right = new.config == old.config and new.last >= old.last
                _check(right, f"{new} after {old}, which was read")
                self._meta = new
                self._share()
                yield connection

    def _share(self):
        """Lets all write to the files beside it who may write to the folder,
        as the writer may be another user than the reader that made them."""
        readers = os.stat(self.path).st_mode & 0o044  # and no others
        writers = os.stat(self.path.parent).st_mode & (readers >> 1)
        for name in "-wal", "-shm":
            # By its name: whoever closes the file drops SQLite's locks.
            path = f"{self.path}{name}"
            with contextlib.suppress(OSError):
                if not os.path.islink(path):
                    os.chmod(path, 0o600 | readers | writers)

    def _check_owner(self):
        if self.owner != os.getpid():
            raise ValueError(f"A fork must open its store. Got: {self.path}")


def exists(folder):
    """True if there is a store, whole or damaged; ValueError for an old one."""
    folder = pathlib.Path(folder)
    if (folder / "manifest.json").exists() and any(folder.glob("log-*.bin")):
        raise ValueError(f"{folder} must be of format 2. Received: format 1")
    return (folder / NAME).exists()


def _create(path, config, operations):
    for stray in path.parent.glob(".memory.writing.sqlite*"):
        stray.unlink()  # a killed process has left it
    # SQLite need not flush, as the file is flushed as a whole.
    settings = {"journal_mode": "OFF", "synchronous": "OFF", **IDENTITY}
    settings = [f"PRAGMA {name}={value};" for name, value in settings.items()]
    with files.atomic_write(path) as aside, _explained("write", aside):
        with contextlib.closing(_connect(aside, "rwc")) as connection:
            connection.executescript("".join([*settings, "BEGIN;", SCHEMA]))
            # The time: readers of a store that is gone read all of this one.
            meta = Meta(None, 0, time.time_ns())
            _write(connection, meta, operations, config)
            connection.execute("COMMIT")
            if _pragma(connection, "journal_mode=WAL") != "wal":
                raise OSError("the file system has no shared memory")


def _write(connection, meta, operations, config):
    """Adds operations, or replaces all with a config; gives the new `Meta`."""
    _, first, last = meta
    if config is not None:
        connection.execute("DELETE FROM operations")
        clear = Operation(-1, *np.zeros((2, 0, 0)))
        first, operations = last + 1, itertools.chain([clear], operations)
    for number, (row, *arrays) in enumerate(operations, last + 1):
        blobs = [array.tobytes() for array in arrays]
        key = number, int(row), len(arrays[0])
        new = *key, _checksum(key, *blobs), *blobs
        connection.execute("INSERT INTO operations VALUES (?,?,?,?,?,?)", new)
        last = number
    meta = Meta(config or meta.config, first, last)
    connection.execute("DELETE FROM meta")
    new = *meta, _checksum(meta)
    connection.execute("INSERT INTO meta VALUES (?, ?, ?, ?)", new)
    return meta


def _checksum(values, *blobs):
    return zlib.crc32(b"".join([repr(tuple(values)).encode(), *blobs]))


def _read_meta(connection):
    """`Meta`, if the file is a store."""
    found = {name: _pragma(connection, name) for name in IDENTITY}
    _check(found == IDENTITY, f"{found} instead of {IDENTITY}")
    schema = "SELECT group_concat(sql, ';') FROM sqlite_master"
    found = connection.execute(schema).fetchall()
    _check(found == [(SCHEMA,)], "another schema")
    found = connection.execute("SELECT * FROM meta LIMIT 2").fetchall()
    types = [type(field) for row in found for field in row]
    _check(types == [str, int, int, int], "another kind of meta")
    meta, crc = Meta(*found[0][:3]), found[0][3]
    right = crc == _checksum(meta) and type(json.loads(meta.config)) is dict
    _check(right and 0 < meta.first <= meta.last < 1 << 62, f"{meta}")
    return meta


def _check(condition, found):
    if not condition:
        raise sqlite3.DatabaseError(found)


def _connect(path, mode):
    is_wal = path.with_name(f"{path.name}-wal").exists()
    if not is_wal and not os.access(path.parent, os.W_OK):
        mode += "&immutable=1"  # no locks, which are files
    uri = f"{path.as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _pragma(connection, text):
    return connection.execute(f"PRAGMA {text}").fetchone()[0]


@contextlib.contextmanager
def _explained(verb, path):
    kept = "It is as it was. SQLite needs room, locks and shared memory there."
    also = (sqlite3.OperationalError,)
    try:
        with files.explain_os_errors(path, kept, also, verb):
            yield
    except (sqlite3.Error, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be as keras_memory wrote it. Received: {error}"
        ) from error
