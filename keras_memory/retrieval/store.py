"""The entries of a memory on disk, in one SQLite file.

A store is a folder with the files `memory.sqlite` and `lock`; its only writer
holds `lock` locked. While the store is open, and after a kill, SQLite keeps its
write-ahead log (WAL) in `memory.sqlite-wal` and an index of that in
`memory.sqlite-shm`. The tables are:

`meta`, one row: config, JSON; first and last, the numbers of the first and the
    last operation; crc, the CRC-32 of these three.
`operations`, one row per operation: number, consecutive from first to last;
    row, the row of the memory; count, the number of entries added to that row,
    or 0 to clear it; crc, the CRC-32 of number, row, count and the two blobs;
    keys and vals, the bytes of two arrays. The first operation has row -1: it
    clears all rows.

SQLite does not verify its pages, so each operation carries a CRC, which shows a
change, and a consecutive number, which shows a loss. A damaged WAL looks like
an uncommitted transaction, so each commit is checkpointed into the main file at
once.
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
# The application id is "KMem"; format 1 was a log. auto_vacuum, which frees the
# space of deleted rows, must be set before any table exists.
IDENTITY = {"auto_vacuum": 1, "application_id": 0x4B4D656D, "user_version": 2}
SCHEMA = (
    "CREATE TABLE meta (config TEXT, first INTEGER, last INTEGER, crc INTEGER);"
    "CREATE TABLE operations (number INTEGER PRIMARY KEY, row INTEGER, "
    "count INTEGER, crc INTEGER, keys BLOB, vals BLOB)"
)
# A blob of an unexpected length is not read, so it takes no memory.
SELECT = """SELECT row, count, crc, keys, vals FROM operations WHERE
    number = ? AND length(keys) = count * ? AND length(vals) = count * ?"""

# Adds `keys` and `values`, (n, width) arrays, to `row`, an int. With n = 0 it
# clears that row, or all rows if `row` is -1.
Operation = collections.namedtuple("Operation", "row keys values")
Meta = collections.namedtuple("Meta", "config first last")


class Store:
    """The operations in a folder, for one writer and any number of readers.

    Only one thread at a time may use a store, and no thread may fork the
    process meanwhile.

    Args:
        folder: path of the store.
        mode: "r" to read, without a lock; "a" to write, which creates a store
            if absent, and holds the lock until `close`.
        config: dict for JSON, of a store that is created or replaced.
        operations: iterable of `Operation`s that replace all stored ones; None
            keeps the stored ones.

    Raises:
        ValueError: another writer holds the lock, or the file is damaged, or of
            another format or program. The file stays unchanged.
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
                if mode == "a":  # writes to damaged pages could damage others
                    told = _pragma(connection, "quick_check(1)")
                    _check(told == "ok", told)
                    files.fsync(self.path.parent)  # not done before a kill?
            if operations is not None:
                self.commit(operations, replace=True)
            self.config = json.loads(self._meta.config)
            self._held = held.pop_all()

    def operations(self, key_dim, value_dim, value_dtype):
        """Yields the committed `Operation`s that this store has not read yet,
        with float32 keys. A caller who stops early gets the same ones again.

        Raises:
            ValueError: the file is damaged, or another store is in its place.
        """
        kinds = (
            np.dtype(("f4", (key_dim,))),
            np.dtype((value_dtype, (value_dim,))),
        )
        sizes = [kind.itemsize for kind in kinds]
        with self._reading() as connection:
            begin = max(self._read + 1, self._meta.first)
            for number in range(begin, self._meta.last + 1):
                record = connection.execute(SELECT, (number, *sizes)).fetchone()
                row, count, crc, *blobs = record or [None] * 5
                types = [type(field) for field in (row, count, *blobs)]
                right = types == [int, int, bytes, bytes]
                right = right and crc == _checksum((number, row, count), *blobs)
                _check(right, f"operation {number}: another size or checksum")
                arrays = map(np.ndarray, (count, count), kinds, blobs)
                yield Operation(row, *arrays)
        self._read = self._meta.last

    def commit(self, operations, replace=False):
        """Adds an iterable of `Operation`s, or replaces all, in a transaction:
        readers see all of them or none, and a commit survives kills and power
        loss. An OSError leaves the store unchanged."""
        self._check_owner()
        if self._mode != "a":
            raise ValueError(
                f"The store must be open for writing. Received: {self.path}"
            )
        config = json.dumps(self.config) if replace else None
        with _explained("write", self.path), contextlib.ExitStack() as undo:
            undo.callback(self.disconnect)  # rolls back
            if self._connection is None:
                self._connection = _connect(self.path, "rw")
                self._connection.execute("PRAGMA synchronous=FULL")
                self._inode = os.stat(self.path).st_ino
            _pragma(self._connection, "busy_timeout=5000")
            self._connection.execute("BEGIN IMMEDIATE")
            current = _read_meta(self._connection), os.stat(self.path).st_ino
            if current != (self._meta, self._inode):
                raise OSError("the store was replaced; open it again")
            meta = _write(self._connection, self._meta, operations, config)
            self._connection.execute("COMMIT")
            self._meta = meta
            undo.pop_all()
        # Checkpoints the WAL into the main file, unless readers hold it.
        with contextlib.suppress(sqlite3.Error):
            _pragma(self._connection, "busy_timeout=0")
            _pragma(self._connection, "wal_checkpoint(TRUNCATE)")

    def disconnect(self):
        """Closes the connection to the file, until the next commit."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def close(self):
        """Closes the store and releases its lock."""
        self.disconnect()
        self._mode = "closed"
        self._held.close()

    @contextlib.contextmanager
    def _reading(self):
        """A connection in a read transaction; `_meta` is what it sees."""
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
        """Gives write access to SQLite's two files to all who can write to the
        folder, since the user who reads may have made them, not the writer."""
        readers = os.stat(self.path).st_mode & 0o044  # and nobody else
        writers = os.stat(self.path.parent).st_mode & (readers >> 1)
        for name in "-wal", "-shm":
            # By name: closing a file handle would drop SQLite's locks.
            path = f"{self.path}{name}"
            with contextlib.suppress(OSError):
                if not os.path.islink(path):
                    os.chmod(path, 0o600 | readers | writers)

    def _check_owner(self):
        if self.owner != os.getpid():
            raise ValueError(
                "The folder must be opened in this process: call "
                "`KNNMemory.open` after the fork. "
                f"Received: a fork, {self.path}"
            )


def exists(folder):
    """Whether the folder has a store, intact or damaged; ValueError if it has
    the old format."""
    folder = pathlib.Path(folder)
    if (folder / "manifest.json").exists() and any(folder.glob("log-*.bin")):
        raise ValueError(
            "`folder` must hold a memory of format 2: this version cannot read "
            "format 1; add its entries to a new memory. "
            f"Received: format 1, in {folder}"
        )
    return (folder / NAME).exists()


def _create(path, config, operations):
    for stray in path.parent.glob(".memory.writing.sqlite*"):
        stray.unlink()  # left by a killed process
    # SQLite need not flush: `atomic_write` flushes the whole file.
    settings = {"journal_mode": "OFF", "synchronous": "OFF", **IDENTITY}
    settings = [f"PRAGMA {name}={value};" for name, value in settings.items()]
    with files.atomic_write(path) as aside, _explained("write", aside):
        with contextlib.closing(_connect(aside, "rwc")) as connection:
            connection.executescript("".join([*settings, "BEGIN;", SCHEMA]))
            # Numbering starts at the current time, above all numbers before,
            # so a reader of a deleted store reads the new one in full.
            meta = Meta(None, 0, time.time_ns())
            _write(connection, meta, operations, config)
            connection.execute("COMMIT")
            if _pragma(connection, "journal_mode=WAL") != "wal":
                raise OSError("the file system has no shared memory")


def _write(connection, meta, operations, config):
    """Adds operations or, with a config, replaces all; returns the new
    `Meta`."""
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
    """The `Meta` of a file, which is checked to be a store."""
    pragmas = {name: _pragma(connection, name) for name in IDENTITY}
    _check(pragmas == IDENTITY, f"{pragmas} instead of {IDENTITY}")
    schema = "SELECT group_concat(sql, ';') FROM sqlite_master"
    schemas = connection.execute(schema).fetchall()
    _check(schemas == [(SCHEMA,)], "another schema")
    rows = connection.execute("SELECT * FROM meta LIMIT 2").fetchall()
    types = [type(field) for row in rows for field in row]
    _check(types == [str, int, int, int], "another kind of meta")
    meta, crc = Meta(*rows[0][:3]), rows[0][3]
    right = crc == _checksum(meta) and type(json.loads(meta.config)) is dict
    _check(right and 0 < meta.first <= meta.last < 1 << 62, f"{meta}")
    return meta


def _check(condition, message):
    if not condition:
        raise sqlite3.DatabaseError(message)


def _connect(path, mode):
    is_wal = path.with_name(f"{path.name}-wal").exists()
    if not is_wal and not os.access(path.parent, os.W_OK):
        mode += "&immutable=1"  # locks would need files in the folder
    uri = f"{path.as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _pragma(connection, text):
    return connection.execute(f"PRAGMA {text}").fetchone()[0]


@contextlib.contextmanager
def _explained(verb, path):
    kept = "It is unchanged. SQLite needs space, locks and shared memory there."
    also = (sqlite3.OperationalError,)
    try:
        with files.explain_os_errors(path, kept, also, verb):
            yield
    except (sqlite3.Error, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be as keras_memory wrote it. Received: {error}"
        ) from error
