"""A store on disk returns the committed operations or raises an error."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import sys

import ml_dtypes
import numpy as np
import programs
import pytest
from test_full_disk import files_of_at_most

from keras_memory import files
from keras_memory.retrieval import store as module
from keras_memory.retrieval.store import Operation
from keras_memory.retrieval.store import Store
from keras_memory.retrieval.store import exists

CONFIG = {"key_dim": 2, "name": "é", "clip": None}
CLEARED = (-1, (0, 2), b"", b"")
PACKAGE = pathlib.Path(module.__file__).parents[1]

# The start of scripts that import the module without Keras.
ALONE = f"""
import contextlib, os, random, signal, sys, time, types
for name, path in ("", ""), (".retrieval", "/retrieval"):
    package = types.ModuleType("keras_memory" + name)
    package.__path__ = [{str(PACKAGE)!r} + path]
    sys.modules["keras_memory" + name] = package
import numpy as np
from keras_memory.retrieval.store import Operation, Store, exists
"""


def made(*numbers):
    """Distinct operations; every third one clears."""
    for i in numbers:
        rng = np.random.default_rng(i)
        shape = i % 3, 2
        yield Operation(
            i % 7,
            rng.normal(size=shape).astype("f4"),
            rng.normal(size=(i % 3, 5)).astype("f4"),
        )


def bits(operations):
    """Operations as comparable values."""
    return [
        (row, keys.shape, keys.tobytes(), values.tobytes())
        for row, keys, values in operations
    ]


def rest(store):
    return bits(store.operations(2, 5, "f4"))


def read(folder, mode="r"):
    with contextlib.closing(Store(folder, mode)) as store:
        return rest(store)


def content(folder):
    return (folder / "memory.sqlite").read_bytes()


@pytest.fixture
def folder(tmp_path):
    """A store of five operations."""
    Store(tmp_path / "store", "a", CONFIG, made(*range(5))).close()
    return tmp_path / "store"


FIVE = [CLEARED, *bits(made(*range(5)))]


# Reading committed operations.


def test_committed_operations_are_read(tmp_path):
    folder = tmp_path / "with" / "parents of 100%?#"
    assert not exists(folder)
    with contextlib.closing(Store(folder, "a", CONFIG)) as store:
        assert exists(folder) and store.config == CONFIG
        assert rest(store) == [CLEARED]
        store.commit(made(0, 1))
        store.commit([])
        store.commit(made(2, 3))
    with contextlib.closing(Store(str(folder), "a")) as store:
        assert rest(store) == [CLEARED, *bits(made(*range(4)))]
        store.commit(made(4))
        assert rest(store) == bits(made(4))
    reader = Store(folder, "r")
    assert reader.config == CONFIG
    next(reader.operations(2, 5, "f4"))  # stops after the first
    assert rest(reader) == FIVE
    assert rest(reader) == []
    reader.close()
    Store(folder, "a").disconnect()
    assert {"lock", "memory.sqlite"} <= set(os.listdir(folder))


@pytest.mark.parametrize("widths", [(2, 0), (1, 3)])
@pytest.mark.parametrize("dtype", ["f8", "i8", "f2", ml_dtypes.bfloat16])
def test_arrays_come_back_in_their_dtype(widths, dtype, tmp_path):
    keys, values = (
        np.arange(4 * width).reshape(width, 4).T for width in widths
    )
    keys, values = keys.astype("f4"), values.astype(dtype)
    store = Store(tmp_path, "a", {}, [Operation(np.int64(3), keys, values)])
    store.close()
    with contextlib.closing(Store(tmp_path, "r")) as store:
        _, found = store.operations(*widths, dtype)
    assert found.row == 3
    for x, y in zip(found[1:], (keys, values)):
        assert x.dtype == y.dtype and (x == y).all() and x.shape == y.shape


def test_a_missing_store_is_refused(tmp_path):
    for absent in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match="memory.sqlite"):
            Store(absent, "r")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Store(tmp_path / "file", "a", CONFIG)


# One writer, any number of readers.


def test_readers_see_committed_operations(folder):
    store, early, late = (Store(folder, mode) for mode in "arr")
    assert rest(early) == FIVE
    interrupted = early.operations(2, 5, "f4")
    assert rest(early) == []

    def half():
        yield from made(5)
        assert rest(early) == []
        yield from made(6)

    store.commit(half())
    assert rest(early) == bits(made(5, 6))
    store.commit(made(7))
    assert rest(late) == [*FIVE, *bits(made(5, 6, 7))]
    store.commit(made(8))
    store.close()
    assert bits(interrupted) == bits(made(7, 8))
    assert rest(late) == bits(made(8))
    early.close()
    late.close()


def test_readers_see_a_replacement(folder):
    store, reader, late = (Store(folder, mode) for mode in "arr")
    assert rest(reader) == FIVE
    going = late.operations(2, 5, "f4")
    first = next(going)
    store.commit(made(5))
    store.commit(made(10, 11), replace=True)
    assert bits([first, *going]) == FIVE  # the state at its start
    assert rest(reader) == rest(late) == [CLEARED, *bits(made(10, 11))]
    store.commit(made(12))
    assert rest(reader) == bits(made(12))
    store.commit([], replace=True)
    assert rest(reader) == [CLEARED]
    store.close()
    # The same holds if a new store replaces the whole file.
    Store(folder, "a", CONFIG, made(20, 21)).close()
    assert rest(reader) == [CLEARED, *bits(made(20, 21))]
    for path in folder.iterdir():
        path.unlink()
    Store(folder, "a", CONFIG, made(22)).close()
    assert rest(reader) == [CLEARED, *bits(made(22))]
    Store(folder, "a", {"key_dim": 3}, made(23)).close()
    for _ in range(2):
        with pytest.raises(
            ValueError, match='memory.sqlite.*"key_dim": 3.*after'
        ):
            rest(reader)
    assert read(folder) == [CLEARED, *bits(made(23))]


def test_a_process_has_only_one_writer(folder):
    store = Store(folder, "a")
    for arguments in (), (CONFIG, made(1)):
        with pytest.raises(ValueError, match="Only one.*Received: .*store"):
            Store(folder, "a", *arguments)
    store.commit(made(5))
    store.close()
    store.close()
    assert read(folder, "a") == [*FIVE, *bits(made(5))]


def test_other_processes_are_refused_until_a_writer_dies(folder):
    code = ALONE + "x = Store(sys.argv[1], 'a'); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"1\n"
        try:
            with pytest.raises(ValueError, match="Only one"):
                Store(folder, "a")
            assert read(folder) == FIVE
        finally:
            other.kill()
    assert read(folder, "a") == FIVE


FORKED = """
import os, sys
import numpy as np
from keras_memory import KNNMemory

folder = sys.argv[1]
sizes = {"key_dim": 2, "memory_size": 100, "search_method": "exact"}
memory = KNNMemory.open(folder, "a", **sizes)
memory.add(np.ones((1, 2)), np.ones((1, 2)))
memory.flush()
reader = KNNMemory.open(folder)
memory.add(np.ones((1, 2)), np.ones((1, 2)))
child = os.fork()
if not child:
    again = lambda: KNNMemory.open(folder, "a")
    for call in memory.flush, reader.refresh, again:
        try:
            call()
        except ValueError as error:
            print(str(error)[:25], flush=True)
    memory.close()
    reader.close()
    assert KNNMemory.open(folder).size() == [1]
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
memory.flush()
assert reader.refresh() and reader.size() == [2]
alive, stop = os.pipe()
child = os.fork()
if not child:
    os.close(stop)
    os.read(alive, 1)  # until the parent is done
    os._exit(0)
memory.close()  # and the child keeps no lock
with KNNMemory.open(folder, "a") as memory:
    assert memory.size() == [2]
os.close(stop)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_forks_must_open_a_store_to_write(tmp_path):
    told = programs.output(
        FORKED, tmp_path / "memory", KERAS_BACKEND="numpy", timeout=120
    )
    refused = [*2 * ["The folder must be opened"], "Only one writer at a time"]
    assert told.split("\n")[:3] == refused


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_a_fork_does_not_keep_the_lock_of_a_parent_that_is_killed(folder):
    code = ALONE + (
        "store = Store(sys.argv[1], 'a')\n"
        "if not os.fork():\n"
        "    print(1, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == b"1\n"
        process.kill()
        process.wait()
        Store(folder, "a").close()
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("is_connected", [False, True])
@pytest.mark.parametrize("is_new", [False, True])
def test_a_store_does_not_overwrite_another(is_new, is_connected, tmp_path):
    folder = tmp_path / "store"
    store = Store(folder, "a", CONFIG)
    if is_connected:
        store.commit(made(0))
    folder.rename(tmp_path / "moved")
    if is_new:
        Store(folder, "a", CONFIG, made(1)).close()
    for _ in range(2):
        with pytest.raises(OSError, match="memory.sqlite"):
            store.commit(made(2))
    store.close()
    assert exists(folder) == is_new
    if is_new:
        assert read(folder) == [CLEARED, *bits(made(1))]
    expected = [CLEARED, *bits(made(0))] if is_connected else [CLEARED]
    assert read(tmp_path / "moved") == expected


# Damaged and foreign files.


def refused(folder, match="memory.sqlite must be as.*Received: "):
    """No mode opens the file, and the file is not changed."""
    before = content(folder)
    assert exists(folder)  # so that no mode creates a new one
    for mode in "rar":
        with pytest.raises(ValueError, match=match):
            read(folder, mode)
        assert content(folder) == before


def flip(folder, numbers, monkeypatch):
    """Flips bits, one at a time: either an error is raised, or nothing is lost,
    even after further writes."""
    monkeypatch.setattr(files, "fsync", lambda path: None)  # too slow
    whole, path, refusals = content(folder), folder / "memory.sqlite", 0
    for number in numbers:
        flipped = bytearray(whole)
        flipped[number // 8] ^= 1 << number % 8
        path.write_bytes(flipped)
        try:
            assert read(folder) == FIVE, number
            expected = FIVE
        except (ValueError, OSError) as error:
            expected = None
            assert "memory.sqlite" in str(error), number
        try:
            with contextlib.closing(Store(folder, "a")) as store:
                assert rest(store) == expected, number
                store.commit(made(5))
            assert read(folder) == [*FIVE, *bits(made(5))], number
        except (ValueError, OSError) as error:
            refusals += 1
            assert "memory.sqlite" in str(error), number
            assert bytes(flipped) == content(folder), number
        for name in "-wal", "-shm":
            path.with_name(f"memory.sqlite{name}").unlink(missing_ok=True)
    return refusals / len(numbers)


def test_a_flipped_bit_is_detected_or_harmless(folder, monkeypatch):
    size = len(content(folder))
    assert size == 4 * 4096
    places = [*range(0, size, 211)]
    for page in range(0, size, 4096):  # content is at both ends of a page
        places += range(page, page + 100, 3)
        places += range(page + 3900, page + 4096, 2)
    rng = np.random.default_rng(1)
    numbers = 8 * np.array(places) + rng.integers(8, size=len(places))
    assert 0.3 < flip(folder, numbers, monkeypatch) < 0.7


@pytest.mark.slow
def test_a_flipped_bit_of_any_byte_is_detected_or_harmless(folder, monkeypatch):
    rng = np.random.default_rng(2)
    numbers = 8 * np.arange(4 * 4096) + rng.integers(8, size=4 * 4096)
    flip(folder, numbers, monkeypatch)


def test_a_truncated_file_is_refused(folder):
    whole = content(folder)
    for size in [*range(0, len(whole), 511), *range(len(whole))[-3:]]:
        (folder / "memory.sqlite").write_bytes(whole[:size])
        refused(folder)
    for other in (b"text" * 5000, bytes(len(whole)), whole + bytes(5)):
        (folder / "memory.sqlite").write_bytes(other)
        if other[:-5] != whole:
            refused(folder)
    assert read(folder) == FIVE


def test_a_truncated_sqlite_log_gives_earlier_commits(folder, tmp_path):
    """A kill may leave such a log if a reader has delayed its merge."""
    store, reader = Store(folder, "a"), Store(folder, "r")
    reading = reader.operations(2, 5, "f4")
    next(reading)
    for i in range(5, 9):
        store.commit(made(i))
    wal, main = (folder / "memory.sqlite-wal").read_bytes(), content(folder)
    store.close()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "memory.sqlite").write_bytes(main)
    lengths = set()
    for size in range(0, len(wal) + 1, 200):
        (tmp_path / "new" / "memory.sqlite-wal").write_bytes(wal[:size])
        found = read(tmp_path / "new")
        assert found == [CLEARED, *bits(made(*range(9)))][: len(found)]
        lengths.add(len(found))
    assert lengths >= {6, 7, 8, 9}


def test_a_commit_does_not_stay_in_the_sqlite_log(folder):
    """Damage of the log would go unnoticed, and copies may omit it."""
    with contextlib.closing(Store(folder, "a")) as store:
        store.commit(made(5))
        for name in "-wal", "-shm":
            (folder / f"memory.sqlite{name}").write_bytes(b"damage")
            (folder / f"memory.sqlite{name}").rename(folder / name)
        assert read(folder) == [*FIVE, *bits(made(5))]


def test_files_of_a_reader_can_be_written_by_a_writer(folder):
    """The writer may be another user, in a folder that both can write to."""
    folder.chmod(0o777)
    reader = Store(folder, "r")
    reading = reader.operations(2, 5, "f4")
    next(reading)
    assert (folder / "memory.sqlite-shm").stat().st_mode & 0o777 == 0o666
    reading.close()
    (folder / "memory.sqlite").chmod(0o600)  # private
    next(Store(folder, "r").operations(2, 5, "f4"))
    assert (folder / "memory.sqlite-shm").stat().st_mode & 0o777 == 0o600


def test_only_a_writer_commits(folder):
    reader, writer = Store(folder, "r"), Store(folder, "a")
    writer.close()
    for store in reader, writer:
        with pytest.raises(ValueError, match="must be open for writing"):
            store.commit(made(5))
    assert read(folder) == FIVE


HOSTILE = {
    "trigger": "CREATE TRIGGER t AFTER INSERT ON meta BEGIN SELECT 1; END",
    "view": "DROP TABLE meta; CREATE VIEW meta AS SELECT 1",
    "index": "CREATE INDEX i ON operations (abs(row))",
    "more": "CREATE TABLE more (a)",
    "no-meta": "DELETE FROM meta",
    "two-metas": "INSERT INTO meta SELECT * FROM meta",
    "types": "UPDATE meta SET config = CAST(config AS BLOB)",
    "numbers": "UPDATE meta SET last = last + 1",
    "lost": "DELETE FROM operations WHERE row = 4",
    "lost-last": "DELETE FROM operations WHERE number = "
    "(SELECT max(number) FROM operations)",
    "row": "UPDATE operations SET row = 6 WHERE row = 4",
    "text": "UPDATE operations SET keys = 'é' || hex(zeroblob(3))",
    "null": "UPDATE operations SET vals = NULL WHERE count = 1",
    "count": "UPDATE operations SET count = 1 << 61",
    "negative": "UPDATE operations SET count = -1",
    "real": "UPDATE operations SET count = 1.5",
    "big": "UPDATE operations SET keys = zeroblob(1 << 24)",
    "another-program": "PRAGMA application_id = 5",
    "newer-format": "PRAGMA user_version = 3",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_foreign_file_is_refused(name, folder):
    connection = sqlite3.connect(folder / "memory.sqlite")
    connection.executescript(HOSTILE[name])
    connection.close()
    refused(folder)


@pytest.mark.parametrize("count", [1, 2, 1 << 40, -1])
def test_wrong_sizes_are_refused_despite_right_checksums(count, tmp_path):
    Store(tmp_path, "a", CONFIG, made(1)).close()
    connection = sqlite3.connect(tmp_path / "memory.sqlite")
    (number,) = connection.execute("SELECT last FROM meta").fetchone()
    for blobs in (bytes(16), bytes(1 << 20)), (b"", b""), (bytes(8), bytes(20)):
        if count == 1 and blobs[1] == bytes(20):
            continue  # the right size
        crc = module._checksum((number, 1, count), *blobs)
        new = 1, count, crc, *blobs
        text = "UPDATE operations SET row=?, count=?, crc=?, keys=?, vals=?"
        connection.execute(f"{text} WHERE number = {number}", new)
        connection.commit()
        refused(tmp_path, "another size")
    connection.close()


def test_a_foreign_config_is_refused(folder):
    connection = sqlite3.connect(folder / "memory.sqlite")
    for config in "{", "[" * 100_000, "9" * 10_000, "[]":
        _, first, last, _ = connection.execute("SELECT * FROM meta").fetchone()
        crc = module._checksum((config, first, last))
        new = "UPDATE meta SET config = ?, crc = ?"
        connection.execute(new, (config, crc))
        connection.commit()
        for mode in "ra":
            with pytest.raises(ValueError, match="memory.sqlite"):
                Store(folder, mode)
    connection.close()


@pytest.mark.parametrize("program", ["", "PRAGMA journal_mode=WAL;"])
def test_a_database_of_another_program_is_kept(program, tmp_path):
    path = tmp_path / "memory.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(program + "CREATE TABLE theirs (a)")
    connection.close()
    refused(tmp_path)
    with pytest.raises(ValueError, match="memory.sqlite must be as"):
        Store(tmp_path, "a", CONFIG, made(1))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT * FROM theirs").fetchall() == []


def test_a_store_of_the_old_format_is_refused(tmp_path):
    (tmp_path / "log-1.bin").write_bytes(b"kerasmem")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1}))
    for mode in "ra":
        with pytest.raises(ValueError, match="of format 2.*Received: format 1"):
            Store(tmp_path, mode, CONFIG)
    assert not (tmp_path / "memory.sqlite").exists()
    (tmp_path / "log-1.bin").unlink()  # a manifest of another program
    Store(tmp_path, "a", CONFIG).close()


# Full and read-only disks, and disks without shared memory.


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("is_connected", [False, True])
def test_a_full_disk_keeps_the_committed_operations(
    replace, is_connected, folder
):
    big = Operation(1, np.ones((9000, 2), "f4"), np.ones((9000, 5), "f4"))
    expected = FIVE
    with contextlib.closing(Store(folder, "a")) as store:
        if is_connected:
            store.commit(made(5))
            expected = [*FIVE, *bits(made(5))]
        for size in (0, 100, 5000, 33_000, 60_000, 100_000, 252_000):
            with (
                files_of_at_most(size),
                pytest.raises(OSError, match="needs space"),
            ):
                store.commit([*made(6), big], replace)
            assert read(folder) == expected
        store.commit([*made(6), big], replace)
        store.commit(made(7))
    new = bits([*made(6), big, *made(7)])
    assert read(folder) == [*([CLEARED] if replace else expected), *new]


def test_a_full_sqlite_database_keeps_the_committed_operations(folder):
    """SQLite's limit fails in another place than the system's."""
    with contextlib.closing(Store(folder, "a")) as store:
        store.commit([])
        store._connection.execute("PRAGMA max_page_count=5")
        big = Operation(1, np.ones((900, 2), "f4"), np.ones((900, 5), "f4"))
        with pytest.raises(OSError, match="sqlite: .*disk is full") as caught:
            store.commit([*made(5), big])
        assert caught.value.errno == errno.ENOSPC
        assert read(folder) == FIVE
        store.commit([big])
    assert read(folder) == [*FIVE, *bits([big])]


def test_a_disk_full_at_the_first_write_leaves_no_store(tmp_path):
    for size in (0, 100, 5000, 12_000):
        with files_of_at_most(size), pytest.raises(OSError, match="sqlite"):
            Store(tmp_path, "a", CONFIG, made(*range(50)))
        assert os.listdir(tmp_path) == ["lock"]
    (tmp_path / ".memory.writing.sqlite").write_bytes(b"of a kill")
    Store(tmp_path, "a", CONFIG, made(1)).close()
    assert read(tmp_path) == [CLEARED, *bits(made(1))]
    assert ".memory.writing.sqlite" not in os.listdir(tmp_path)


def test_a_disk_without_shared_memory_is_refused(folder, tmp_path, monkeypatch):
    connect = sqlite3.connect

    def elsewhere(path, **options):
        return connect(f"{path}&vfs=unix-dotfile", **options)

    monkeypatch.setattr(module.sqlite3, "connect", elsewhere)
    with pytest.raises(OSError, match="no shared memory"):
        Store(tmp_path / "new", "a", CONFIG)
    assert os.listdir(tmp_path / "new") == ["lock"]
    with pytest.raises(OSError, match="not read .*shared memory"):
        Store(folder, "r")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_a_read_only_folder_can_be_read(folder):
    """SQLite cannot create `memory.sqlite-shm` there."""
    code = ALONE + (
        "os.geteuid() or os.setuid(65534)\n"
        "assert not os.access(sys.argv[1], os.W_OK)\n"
        "store = Store(sys.argv[1], 'r')\n"
        "print(len(list(store.operations(2, 5, 'f4'))))\n"
        "try:\n"
        "    Store(sys.argv[1], 'a')\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path != pathlib.Path("/"):
            path.chmod(path.stat().st_mode | 0o555)
    for is_written in (False, True):
        store = Store(folder, "a") if is_written else None
        if is_written:
            store.commit(made(5))
        folder.chmod(0o555)
        before = sorted(os.listdir(folder))
        try:
            told = programs.output(code, folder, timeout=120)
        finally:
            folder.chmod(0o755)
        assert told.startswith(f"{6 + is_written}\n") and "denied" in told
        assert sorted(os.listdir(folder)) == before
    store.close()


def test_ctrl_c_keeps_the_committed_operations(folder):
    def interrupted():
        yield from made(5, 6)
        raise KeyboardInterrupt

    with contextlib.closing(Store(folder, "a")) as store:
        for replace in (False, True):
            with pytest.raises(KeyboardInterrupt):
                store.commit(interrupted(), replace)
            assert read(folder) == FIVE
        store.commit(made(5))
    assert read(folder) == [*FIVE, *bits(made(5))]


# Processes that are killed.

KILLS = (
    ALONE
    + """
folder, kills, rng = sys.argv[1], int(sys.argv[2]), random.Random(sys.argv[2])

def numbered(*numbers):
    for i in numbers:
        keys = np.full((1 + i % 50, 30), i, "f4")
        yield Operation(i, keys, keys[:, :20])

def write(told):
    store = Store(folder, "a", {})
    *_, last = store.operations(30, 20, "f4")
    count = last.row + 1
    while True:
        store.commit(numbered(*range(count, count + 5)))
        count += 5
        if count % 35 == 0:
            store.commit(numbered(*range(max(count - 20, 0), count)), True)
        os.write(told, b"%d " % count)

def look(store, count):
    "The number that follows what is there."
    for row, keys, values in store.operations(30, 20, "f4"):
        if row < 0:
            count = None
            continue
        assert count in (None, row) and len(keys) == 1 + row % 50, (count, row)
        assert (keys == row).all() and (values == row).all()
        count = row + 1
    return count

reader, known, replaced = None, 0, 0
for kill in range(kills):
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            write(told)
        finally:
            os._exit(1)
    os.close(told)
    end = time.monotonic() + rng.uniform(0, 0.06)
    seen = known
    while time.monotonic() < end:
        if reader is None and exists(folder):
            reader = Store(folder, "r")
        if reader is not None:
            seen = look(reader, seen) or 0
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it ended by itself"
    with open(heard, "rb") as file:
        numbers = [known, *map(int, file.read().split())]
    if not exists(folder):
        assert numbers == [0]
        continue
    with contextlib.closing(Store(folder, "r")) as store:
        known = look(store, None) or 0
    # A commit that was not acknowledged may be there, but whole.
    assert numbers[-1] <= known <= numbers[-1] + 5 and known % 5 == 0, numbers
    if reader is not None:
        assert (look(reader, seen) or 0) == known
print(known)
"""
)


def test_killed_writers_lose_no_commit(tmp_path):
    told = programs.output(KILLS, tmp_path / "store", 40, timeout=120)
    assert int(told) > 100


@pytest.mark.slow
def test_many_killed_writers_lose_no_commit(tmp_path):
    told = programs.output(KILLS, tmp_path / "store", 1000, timeout=120)
    assert int(told) > 1000


def test_a_store_killed_at_creation_can_be_opened(tmp_path, monkeypatch):
    """Killed before the file gets its name, or just after."""

    def killed(*paths):
        os.kill(os.getpid(), signal.SIGKILL)

    for is_late in (False, True):
        child = os.fork()
        if not child:
            replace = os.replace if is_late else killed
            os.replace = lambda *paths, do=replace: (do(*paths), killed())
            Store(tmp_path / "store", "a", CONFIG, made(*range(5)))
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert exists(tmp_path / "store") == is_late
    assert read(tmp_path / "store", "a") == FIVE
