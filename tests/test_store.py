"""Logs of operations on disk: what goes in comes out, or an error does."""

import ast
import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from keras_memory import durable
from keras_memory.durable import Log
from keras_memory.durable import Operation

CONFIG = {"key_width": 2, "rows": 3, "name": "é", "clip": None}
SOURCE = pathlib.Path(durable.__file__)

# Begins a script that has the module, without Keras and what it brings.
ALONE = f"""
import contextlib, errno, os, resource, sys, types
package = types.ModuleType("keras_memory")
package.__path__ = [{str(SOURCE.parent)!r}]
sys.modules["keras_memory"] = package
import numpy as np
from keras_memory import durable
from keras_memory.durable import Log, Operation
"""


def made(*numbers):
    """Operations that are all different: each fourth one clears."""
    for i in numbers:
        rng = np.random.default_rng(i)
        n = i % 3
        keys = rng.normal(size=(n, 2)).astype("f4")
        values = rng.normal(size=(n, 5)).astype("f4")
        clears = i % 4 == 3
        yield Operation(i % 7, *((None, None) if clears else (keys, values)))


def bits(operations):
    """What can be compared: of each operation its row, shapes and bits."""
    return [
        (
            row,
            *(
                (x.shape, x.dtype.str, x.tobytes())
                for x in rest
                if rest[0] is not None
            ),
        )
        for row, *rest in operations
    ]


def read(folder, mode="r"):
    with contextlib.closing(Log(folder, mode)) as log:
        return bits(log.operations())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_log(folder):
    (path,) = folder.glob("log-*")
    return path


def forge(folder, **changes):
    """Writes a manifest with other entries and the right checksum."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("crc32")
    content.update(changes)
    content = {name: x for name, x in content.items() if x is not ...}
    durable._commit(folder, content)


@pytest.fixture
def folder(tmp_path):
    """A store of five operations."""
    durable.write(tmp_path / "store", CONFIG, made(*range(5)))
    return tmp_path / "store"


# What is written is read.


def test_what_is_appended_is_read(tmp_path):
    folder = tmp_path / "with" / "parents"
    assert not durable.exists(folder)
    with contextlib.closing(Log(folder, "a", CONFIG)) as log:
        assert durable.exists(folder)
        assert log.config == CONFIG
        assert list(log.operations()) == []
        empty = log.size
        log.append(made(*range(7)))
        assert log.size == one_log(folder).stat().st_size > empty
        log.append([])
        log.append(made(7, 8))
    assert read(folder) == read(folder, "a") == bits(made(*range(9)))
    with contextlib.closing(Log(folder, "a", CONFIG)) as log:
        assert bits(log.operations()) == bits(made(*range(9)))
        assert list(log.operations()) == []
        log.append(made(9))
        log.flush()
        assert bits(log.operations()) == bits(made(9))
    with contextlib.closing(Log(str(folder), "r", CONFIG)) as log:
        assert log.config == CONFIG
        assert log.size == one_log(folder).stat().st_size
        first = next(log.operations())
        assert bits([first, *log.operations()]) == bits(made(*range(10)))
    assert sorted(files(folder)) == ["lock", "log-1.bin", "manifest.json"]


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("widths", [(2, 0), (0, 0), (0, 5), (2, 5)])
def test_sizes_may_be_zero(n, widths, tmp_path):
    keys, values = (np.full((n, width), np.nan, "f4") for width in widths)
    written = [Operation(np.int64(2**32 - 1), keys, values)] * 2
    durable.write(tmp_path, {}, written)
    assert read(tmp_path) == bits(written)
    durable.write(tmp_path, {}, [])
    assert read(tmp_path) == []


def test_arrays_are_as_a_memory_takes_them(tmp_path):
    keys = np.arange(12, dtype="f4").reshape(2, 6).T
    values = np.arange(30, dtype="f4").reshape(6, 5)[:, ::-1]
    assert not keys.flags.c_contiguous and not values.flags.c_contiguous
    durable.write(tmp_path, CONFIG, [Operation(1, keys, values)])
    with contextlib.closing(Log(tmp_path, "r")) as log:
        (operation,) = log.operations()
    assert type(operation.row) is int
    for found, written in zip(operation[1:], (keys, values)):
        np.testing.assert_array_equal(found, written)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous and found.flags.writeable


@pytest.mark.parametrize(
    "row, keys, values",
    [
        (-1, np.ones((3, 2), "f4"), np.ones((3, 5), "f4")),
        (2**32, None, None),
        (1.0, None, None),
        (0, np.ones((3, 2), "f4"), None),
        (0, None, np.ones((3, 5), "f4")),
        (0, np.ones((3, 2), "f4"), np.ones((2, 5), "f4")),
        (0, np.ones((3, 2), "f8"), np.ones((3, 5), "f4")),
        (0, np.ones((3, 2), "f4"), np.ones((3, 5), ">f4")),
        (0, np.ones((3, 2, 1), "f4"), np.ones((3, 5), "f4")),
        (0, np.ones(3, "f4"), np.ones(3, "f4")),
        (0, np.float32(1), np.float32(1)),
        (0, [[1.0]], [[1.0]]),
    ],
)
def test_other_operations_are_refused(row, keys, values, folder):
    wrong = [*made(5, 6), Operation(row, keys, values)]
    with contextlib.closing(Log(folder, "a")) as log:
        log.append(made(5))
        before = files(folder)
        for put in (log.append, log.rewrite):
            with pytest.raises(ValueError, match="must have a row.*Received: "):
                put(wrong)
            assert files(folder) == before
        log.append(made(6))
    before = files(folder)
    with pytest.raises(ValueError, match="must have a row.*Received: "):
        durable.write(folder, CONFIG, wrong)
    assert files(folder) == before
    assert read(folder) == bits(made(*range(7)))


def test_config_must_be_the_same(folder):
    before = files(folder)
    other = {**CONFIG, "rows": 4, "more": [1]}
    del other["clip"]
    for mode in "ar":
        with pytest.raises(ValueError) as caught:
            Log(folder, mode, other)
        assert str(caught.value).endswith(
            "Received: rows=4 (stored: 3), clip='none' (stored: None), "
            "more=[1] (stored: 'none')"
        )
        assert files(folder) == before
        Log(folder, mode, CONFIG).close()
        Log(folder, mode).close()


def test_config_is_as_json_has_it(tmp_path):
    config = {"sizes": (1, 2), "of": {7: "seven"}, "rate": 0.1}
    Log(tmp_path, "a", config).close()
    with contextlib.closing(Log(tmp_path, "r", config)) as log:
        assert log.config == {
            "sizes": [1, 2],
            "of": {"7": "seven"},
            "rate": 0.1,
        }
    nested = []
    nested.append(nested)
    for wrong in ("a", [1], {"a": {1, 2}}, {"a": np.nan}, {"a": nested}):
        with pytest.raises(ValueError, match="dict of what JSON.*Received: "):
            durable.write(tmp_path, wrong, [])
        with pytest.raises(ValueError, match="dict of what JSON.*Received: "):
            Log(tmp_path, "a", wrong)


def test_what_is_not_there(tmp_path):
    for absent in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            FileNotFoundError, match="Received: .*manifest.json"
        ):
            Log(absent, "r", CONFIG)
        with pytest.raises(ValueError, match="needs a `config`.*Received: "):
            Log(absent, "a")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="Received: mode='w'"):
        Log(tmp_path, "w", CONFIG)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Log(tmp_path / "file", "a", CONFIG)


def test_a_log_that_is_closed_or_of_another_mode(folder):
    log, reader = Log(folder, "a"), Log(folder, "r")
    with pytest.raises(ValueError, match="of mode r. Received: .*mode a$"):
        log.refresh()
    for call in (
        lambda: reader.append(made(5)),
        reader.flush,
        lambda: reader.rewrite(made(5)),
    ):
        with pytest.raises(ValueError, match="of mode a. Received: .*mode r$"):
            call()
    for one in (log, reader):
        one.close()
        one.close()
    for call in (
        lambda: log.append(made(5)),
        log.flush,
        lambda: log.rewrite(made(5)),
        lambda: next(log.operations()),
        reader.refresh,
        lambda: next(reader.operations()),
    ):
        with pytest.raises(ValueError, match="Received: .*closed$"):
            call()
    assert read(folder) == bits(made(*range(5)))


# One writer, any number of readers.


def test_one_writer_in_a_process(folder):
    log = Log(folder, "a")
    for another in (
        lambda: Log(folder, "a"),
        lambda: durable.write(folder, CONFIG, []),
    ):
        with pytest.raises(ValueError, match="Only one.*Received: .*store"):
            another()
    log.append(made(5))
    log.close()
    Log(folder, "a").close()
    assert read(folder) == bits(made(*range(6)))


def test_one_writer_among_processes_until_its_death(folder):
    code = ALONE + (
        "log = Log(sys.argv[1], 'a')\n"
        "log.append([Operation(1, None, None)])\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"open\n"
        try:
            with pytest.raises(ValueError, match="Only one"):
                Log(folder, "a")
            assert read(folder) == bits(made(*range(5)))
        finally:
            other.kill()
    assert other.returncode == -signal.SIGKILL
    assert read(folder, "a") == bits(made(*range(5)))


FORKED = (
    ALONE
    + """
folder = sys.argv[1]

def rows(number):
    return [Operation(i, np.ones((1, 2), "f4"), np.ones((1, 5), "f4"))
            for i in range(number)]

log, reader = Log(folder, "a"), Log(folder, "r")
before = len(list(reader.operations()))
log.append(rows(3))  # and not flushed
child = os.fork()
if not child:
    for call in (log.flush, lambda: log.append(rows(1)), reader.refresh,
                 lambda: log.rewrite(rows(1)), lambda: Log(folder, "a")):
        try:
            call()
        except ValueError as error:
            print(str(error)[:24])
        else:
            os._exit(1)
    log.close()
    reader.close()
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
log.append(rows(2))
log.flush()
reader.refresh()
assert len(list(reader.operations())) == 5
alive, stop = os.pipe()
child = os.fork()
if not child:
    os.close(stop)
    os.read(alive, 1)  # until the parent is done
    os._exit(0)
log.close()  # and the child keeps no lock
log = Log(folder, "a")
assert len(list(log.operations())) == before + 5
os.close(stop)
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no forks")
def test_forks_write_nothing(folder):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, folder],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    refused = ["A log must be used by t"] * 4 + ["Only one process at a ti"]
    assert [line[:23] for line in done.stdout.splitlines()] == [
        line[:23] for line in refused
    ]


def test_a_folder_is_the_same_wherever_one_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = Log("store", "a", CONFIG)
    log.append(made(0, 1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log.close()
    assert read(tmp_path / "store") == bits(made(0, 1))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_store_that_came_later_is_not_written_over(is_new, tmp_path):
    log = Log(tmp_path / "store", "a", CONFIG)
    log.append(made(0))
    (tmp_path / "store").rename(tmp_path / "moved")
    if is_new:
        with contextlib.closing(Log(tmp_path / "store", "a", CONFIG)) as other:
            other.append(made(1, 2))
    else:
        (tmp_path / "store").mkdir()
    for call in (log.flush, lambda: log.rewrite(made(4)), log.close):
        with pytest.raises(OSError, match="still hold the store.*Received"):
            call()
    if is_new:
        assert read(tmp_path / "store") == bits(made(1, 2))
    else:
        assert not list((tmp_path / "store").iterdir())
    (tmp_path / "moved").rename(tmp_path / "moving")
    if is_new:
        (tmp_path / "store").rename(tmp_path / "other")
    else:
        (tmp_path / "store").rmdir()
    (tmp_path / "moving").rename(tmp_path / "store")
    log.close()
    assert read(tmp_path / "store") == bits(made(0))


def test_readers_see_what_is_flushed(folder):
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(Log(folder, "a")))
        early, late = (
            stack.enter_context(contextlib.closing(Log(folder, "r")))
            for _ in range(2)
        )
        assert bits(early.operations()) == bits(made(*range(5)))
        log.append(made(5, 6))
        assert early.refresh() is None
        assert list(early.operations()) == []
        log.flush()
        assert list(early.operations()) == []  # until it looks
        assert early.refresh() == "more"
        assert early.refresh() is None
        operations = early.operations()
        assert bits([next(operations)]) == bits(made(5))
        log.append(made(7))
        log.flush()
        assert early.refresh() == "more"
        assert bits(operations) == bits(made(6, 7))
        assert late.refresh() == "more"
        assert bits(late.operations()) == bits(made(*range(8)))
        assert early.size == late.size == log.size


def test_readers_see_a_rewrite(folder):
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(Log(folder, "a")))
        reader = stack.enter_context(contextlib.closing(Log(folder, "r")))
        first = next(reader.operations())
        log.append(made(5))
        log.rewrite(made(10, 11, 12))
        assert sorted(files(folder)) == ["lock", "log-2.bin", "manifest.json"]
        assert log.size == one_log(folder).stat().st_size
        # The old one is gone, but not for who has it open.
        rest = reader.operations()
        assert bits([first, *rest]) == bits(made(*range(5)))
        assert reader.refresh() == "anew"
        assert reader.refresh() is None
        assert bits(reader.operations()) == bits(made(10, 11, 12))
        log.append(made(13))
        log.flush()
        assert reader.refresh() == "more"
        assert bits(reader.operations()) == bits(made(13))
        log.rewrite([])
        assert reader.refresh() == "anew"
        assert list(reader.operations()) == []
        log.append(made(14))
    assert read(folder) == bits(made(14))


def test_a_rewrite_may_read_its_own_log(folder):
    with contextlib.closing(Log(folder, "a")) as log:
        log.rewrite(operation for operation in log.operations())
        assert bits(log.operations()) == bits(made(*range(5)))
    assert read(folder) == bits(made(*range(5)))


def test_a_reader_whose_log_is_replaced_while_it_opens(folder, monkeypatch):
    old = durable._read_manifest(folder)
    reader = Log(folder, "r")
    with contextlib.closing(Log(folder, "a")) as log:
        log.rewrite(made(7))
    look = durable._read_manifest
    for open_it in (lambda: Log(folder, "r"), lambda: reader):
        late = [old]
        monkeypatch.setattr(
            durable,
            "_read_manifest",
            lambda folder, late=late: late.pop() if late else look(folder),
        )
        with contextlib.closing(open_it()) as log:
            if log is reader:
                assert log.refresh() is None  # it is what it had
                assert log.refresh() == "anew"
            assert bits(log.operations()) == bits(made(7))
            assert not late


def test_write_replaces_the_store(folder):
    reader = Log(folder, "r")
    names = list(made(*range(20, 24)))
    durable.write(folder, CONFIG, names)
    assert reader.refresh() == "anew"
    assert bits(reader.operations()) == bits(names)
    durable.write(folder, {"other": 1}, made(9))
    with pytest.raises(ValueError, match="Received: .*other='none'"):
        reader.refresh()
    reader.close()
    with contextlib.closing(Log(folder, "r", {"other": 1})) as log:
        assert bits(log.operations()) == bits(made(9))
    assert sorted(files(folder)) == ["lock", "log-3.bin", "manifest.json"]
    # Also one that nobody can read.
    (folder / "manifest.json").write_text("{")
    durable.write(folder, CONFIG, made(1))
    assert read(folder) == bits(made(1))


# What was broken off, and what is damaged.


@pytest.mark.parametrize("cut", [None, 1, 17, 36, 50])
def test_what_was_not_committed_is_cut(cut, folder):
    log = one_log(folder)
    whole = files(folder)
    block = b"".join(bytes(x) for x in durable._block(next(made(4))))
    tail = block[:cut] if cut else block + b"garbage" + bytes(1000)
    with open(log, "ab") as file:
        file.write(tail)
    assert read(folder) == bits(made(*range(5)))
    assert log.read_bytes() == whole[log.name] + tail  # a reader cuts nothing
    assert read(folder, "a") == bits(made(*range(5)))
    assert files(folder) == whole
    with contextlib.closing(Log(folder, "a")) as writer:
        writer.append(made(5))
    assert read(folder) == bits(made(*range(6)))


def refused(folder, error=ValueError, match="Received: "):
    """No mode gives operations, and files stay as they are."""
    before = files(folder)
    for mode in "ra":
        with pytest.raises(error, match=match) as caught:
            read(folder, mode)
        assert type(caught.value) is error
        assert {**files(folder), "lock": b""} == {**before, "lock": b""}


def test_a_log_that_is_cut_is_refused(folder):
    log = one_log(folder)
    whole = log.stat().st_size
    for size in reversed(range(whole)):
        os.truncate(log, size)
        refused(folder, match=f"{log}.*{whole} bytes.*Received: {size} bytes")


def test_a_log_that_is_cut_under_a_reader(folder):
    with contextlib.closing(Log(folder, "r")) as log:
        next(log.operations())
        os.truncate(one_log(folder), 50)
        with pytest.raises(ValueError, match="log-1.bin.*lost. Received: "):
            next(log.operations())


@pytest.mark.parametrize("name", ["manifest.json", "log-1.bin"])
@pytest.mark.parametrize("mode", ["r", "a"])
def test_no_bit_can_flip(name, mode, folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # too slow
    before = files(folder)
    whole, operations = before[name], bits(made(*range(5)))
    harmless = set()

    def put(content):  # `write_bytes` would wait for the disk
        with open(folder / name, "r+b") as file:
            file.write(content)

    for place in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            put(flipped)
            try:
                assert read(folder, mode) == operations
                harmless.add(whole[place])
            except ValueError as error:
                assert type(error) is ValueError, (place, bit)
                assert name in str(error) and "Received: " in str(error)
            assert files(folder) == {**before, name: bytes(flipped)}
    # A space for a line's end, a capital in \\u00e9.
    assert harmless <= (set(b" \n\te") if name == "manifest.json" else set())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"{}",
        b'{"format": 1}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": ' + b"9" * 10_000 + b"}",
        bytes(1000),
    ],
)
def test_a_manifest_that_is_none(content, folder):
    (folder / "manifest.json").write_bytes(content)
    refused(folder, match="manifest.json must be a manifest.*Received: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 0},
        {"format": "1"},
        {"format": True},
        {"log": "../store/log-1.bin"},
        {"log": 1},
        {"length": "9"},
        {"config": []},
        {"store": ...},
        {"more": 1},
    ],
)
def test_a_manifest_of_other_entries(changes, folder):
    forge(folder, **changes)
    refused(folder, match="manifest.json must be a manifest.*Received: ")


def test_a_newer_format(folder):
    forge(folder, format=2)
    refused(folder, match="Received: format 2, of a newer")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "new": 1}))
    refused(folder, match="Received: format 2, of a newer")


def test_files_that_do_not_belong_together(folder, tmp_path):
    other = tmp_path / "other"
    durable.write(other, CONFIG, made(*range(5)))
    mine, others = files(folder), files(other)
    one_log(folder).write_bytes(others["log-1.bin"])
    refused(folder, match="log-1.bin must begin as.*Received: .*store")
    one_log(folder).write_bytes(mine["log-1.bin"])
    one_log(folder).rename(folder / "log-2.bin")
    forge(folder, log="log-2.bin")
    refused(folder, match="log-2.bin must begin as.*Received: .*number 1")
    (folder / "log-2.bin").rename(folder / "log-1.bin")
    forge(folder, log="log-1.bin", operations=6)
    refused(folder, match="must have 6 operations.*Received: 5")
    forge(folder, operations=5, length=2**40)
    refused(folder, match=f"{2**40} bytes.*Received: {len(mine['log-1.bin'])}")
    forge(folder, length=3)
    refused(folder, match="the 3 bytes.*Received: ")
    forge(folder, length=len(mine["log-1.bin"]))
    assert files(folder) == mine
    forge(folder, length=len(mine["log-1.bin"]) - 3)
    with pytest.raises(ValueError, match="log-1.bin.*Received: at byte "):
        read(folder)


def test_a_size_that_is_wrong_asks_for_no_memory(tmp_path):
    """Though its checksum is right."""
    durable.write(tmp_path, {}, [])
    log = one_log(tmp_path)
    header = log.read_bytes()
    for sizes, payload in (
        ((2**31, 2**31, 2**31), 2**64 - 1),
        ((2**20, 2**20, 0), 2**42),
        ((1, 1, 1), 2**42),
        ((0, 0, 0), 4),
    ):
        block = durable.BLOCK.pack(b"KMop", durable.ADD, 0, *sizes, payload)
        crc = durable.CRC.pack(durable.zlib.crc32(block))
        log.write_bytes(header + block + crc)
        forge(tmp_path, length=log.stat().st_size, operations=1)
        refused(tmp_path, match=f"Received: at byte 36, {payload} bytes")


@pytest.mark.parametrize("magic, kind", [(b"KMop", 2), (b"KMxx", 0)])
def test_a_block_of_another_kind(magic, kind, tmp_path):
    """Though its checksum is right: a newer version may have written it."""
    durable.write(tmp_path, {}, [])
    block = durable.BLOCK.pack(magic, kind, 0, 0, 0, 0, 0)
    crc = durable.CRC.pack(durable.zlib.crc32(block))
    with open(one_log(tmp_path), "ab") as file:
        file.write(block + crc)
    forge(tmp_path, length=one_log(tmp_path).stat().st_size, operations=1)
    refused(tmp_path, match=f"Received: at byte 36, no block, but .* {kind}")


def test_missing_files(folder):
    whole = files(folder)
    one_log(folder).unlink()
    refused(folder, FileNotFoundError, "Received: .*log-1.bin, which")
    (folder / "log-1.bin").write_bytes(whole["log-1.bin"])
    (folder / "manifest.json").unlink()
    # Nor does a writer take the folder for an empty one.
    for mode in "ra":
        with pytest.raises(FileNotFoundError, match="Received: .*manifest.jso"):
            Log(folder, mode, CONFIG)
    assert (folder / "log-1.bin").read_bytes() == whole["log-1.bin"]
    (folder / "manifest.json").write_bytes(whole["manifest.json"])
    (folder / "lock").unlink()  # it holds nothing
    assert read(folder) == read(folder, "a") == bits(made(*range(5)))


def test_a_reader_keeps_what_it_has_when_a_refresh_fails(folder):
    with contextlib.closing(Log(folder, "r")) as log:
        whole = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(whole[:-9])
        with pytest.raises(ValueError, match="Received: "):
            log.refresh()
        (folder / "manifest.json").unlink()
        with pytest.raises(FileNotFoundError, match="Received: "):
            log.refresh()
        forge_back = json.loads(whole)
        del forge_back["crc32"]
        durable._commit(folder, {**forge_back, "length": 36, "operations": 0})
        with pytest.raises(ValueError, match="Received: 36 bytes after"):
            log.refresh()
        assert bits(log.operations()) == bits(made(*range(5)))


def test_what_interrupted_writes_left_is_removed(folder):
    whole = files(folder)
    strays = ["log-0.bin", "log-2.bin", "log-11.bin", ".manifest.writing.json"]
    foreign = ["log-x.bin", "log-3.bin.bak", "model.keras"]
    for name in strays + foreign:
        (folder / name).write_bytes(b"half")
    assert read(folder) == bits(made(*range(5)))
    assert files(folder).keys() == {*whole, *strays, *foreign}
    assert read(folder, "a") == bits(made(*range(5)))
    assert files(folder) == {**whole, **dict.fromkeys(foreign, b"half")}


# A disk that is full or breaks.


class Disk:
    """A disk with room for so many bytes, through which `os.write` goes."""

    def __init__(self, monkeypatch):
        self.room = None
        self.write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor, data):
        if self.room is None:
            return self.write(descriptor, data)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(descriptor, data[: self.room])
        self.room -= written
        return written


FULL = "disk must have room.*Received: No space left on device"


def test_a_disk_that_is_full_at_append(folder, monkeypatch):
    disk = Disk(monkeypatch)
    with contextlib.closing(Log(folder, "a")) as log:
        log.append(made(5))
        before, size = files(folder), log.size
        for disk.room in range(0, 150, 7):
            with pytest.raises(OSError, match=FULL) as caught:
                log.append(made(6, 7, 8))
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.__cause__.errno == errno.ENOSPC
            assert files(folder) == before
            assert log.size == size
        disk.room = None
        log.append(made(6, 7, 8))
    assert read(folder) == bits(made(*range(9)))


def test_a_file_that_cannot_be_cut_is_written_over(folder, monkeypatch):
    """What is left is behind what counts."""
    disk = Disk(monkeypatch)
    with contextlib.closing(Log(folder, "a")) as log:

        class Uncut:
            def __getattr__(self, name):
                return getattr(file, name)

            def truncate(self, size):
                raise OSError(errno.EIO, "cannot be cut")

        file, log._file = log._file, Uncut()
        disk.room = 100
        with pytest.raises(OSError, match=FULL):
            log.append(made(6, 7, 8))
        disk.room = None
        log._file = file
        log.append(made(5))
        log.flush()
        assert read(folder) == bits(made(*range(6)))


def test_a_disk_that_is_full_at_flush(folder, monkeypatch):
    disk = Disk(monkeypatch)
    with contextlib.closing(Log(folder, "a")) as log:
        log.append(made(5, 6))
        before = files(folder)
        for disk.room in range(0, len(before["manifest.json"]), 50):
            with pytest.raises(OSError, match=f"still waits.*{FULL[-20:]}"):
                log.flush()
            with pytest.raises(OSError, match=FULL):
                log.close()
            assert files(folder) == before
            assert read(folder) == bits(made(*range(5)))
        disk.room = None
        log.append(made(7))
        log.flush()
        assert read(folder) == bits(made(*range(8)))


def test_a_disk_that_is_full_at_rewrite(folder, monkeypatch):
    disk = Disk(monkeypatch)
    with contextlib.closing(Log(folder, "a")) as log:
        log.append(made(5))
        before, size = files(folder), log.size
        new = list(made(*range(20, 24)))
        durable.write(folder / "measured", CONFIG, new)
        needed = sum(map(len, files(folder / "measured").values()))
        shutil.rmtree(folder / "measured")
        for disk.room in range(0, needed, 50):
            with pytest.raises(OSError, match=FULL) as caught:
                log.rewrite(new)
            assert caught.value.errno == errno.ENOSPC
            assert files(folder) == before
            assert log.size == size
        disk.room = None
        log.append(made(6))
        log.flush()
        assert read(folder) == bits(made(*range(7)))
        log.rewrite(new)
        assert read(folder) == bits(new)


def test_a_disk_that_is_full_at_the_first_write(folder, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    before, new = files(folder), tmp_path / "new"
    for disk.room in range(0, 300, 20):
        with pytest.raises(OSError, match=FULL):
            durable.write(folder, CONFIG, made(9))
        with pytest.raises(OSError, match=FULL):
            Log(new, "a", CONFIG)
        assert files(folder) == before
        assert list(files(new)) == ["lock"]
    disk.room = None
    Log(new, "a", CONFIG).close()
    assert read(new) == []


def test_a_limit_of_the_system(folder):
    code = ALONE + (
        "arrays = [np.ones((9000, width), 'f4') for width in (2, 5)]\n"
        "big = [Operation(1, *arrays)]\n"
        "log = Log(sys.argv[1], 'a')\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "for put in (log.append, log.rewrite):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))\n"
        "    size = log.size\n"
        "    try:\n"
        "        put(big)\n"
        "    except OSError as error:\n"
        "        assert error.errno == errno.EFBIG, error\n"
        "        print(error)\n"
        "    assert log.size == size\n"
        "    names = sorted(os.listdir(sys.argv[1]))\n"
        "    assert names == ['lock', 'log-1.bin', 'manifest.json'], names\n"
        "    assert os.stat(sys.argv[1] + '/log-1.bin').st_size == size\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "    log.append(big)\n"
        "    log.flush()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall("as it was. Received: File too large", done.stdout)) == 2
    )
    big = Operation(1, np.ones((9000, 2), "f4"), np.ones((9000, 5), "f4"))
    assert read(folder) == bits([*made(*range(5)), big, big])


@pytest.mark.parametrize("what", ["log", "folder"])
def test_a_disk_that_breaks_at_flush(what, folder, monkeypatch):
    """What did not come to the disk may be forgotten: no second try."""

    def broken(descriptor):
        mode = os.fstat(descriptor).st_mode
        if what == "log" or stat.S_ISDIR(mode):
            raise OSError(errno.EIO, "Input/output error")

    log = Log(folder, "a")
    log.append(made(5))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="open it anew. Received: Input") as e:
            log.flush()
        assert e.value.errno == errno.EIO
    for again in (
        log.flush,
        lambda: log.append(made(6)),
        lambda: log.rewrite(made(6)),
    ):
        with pytest.raises(OSError, match="anew. Received before: Input"):
            again()
    log.close()
    log.close()
    # Where the folder failed, the manifest was already in its place.
    known = 5 if what == "log" else 6
    with contextlib.closing(Log(folder, "a")) as log:
        assert bits(log.operations()) == bits(made(*range(known)))
        log.append(made(7))
    assert read(folder) == bits(made(*range(known), 7))


@pytest.mark.parametrize("fails", range(1, 5))
def test_a_disk_that_breaks_at_rewrite(fails, folder, monkeypatch):
    """At the log, the folder, the manifest, or the folder again."""
    left = [fails]

    def broken(descriptor):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EIO, "Input/output error")

    log = Log(folder, "a")
    before = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Received: Input"):
            log.rewrite(made(8))
    if fails < 4:
        assert files(folder) == before
        log.append(made(5))
        log.close()
        assert read(folder) == bits(made(*range(6)))
    else:
        with pytest.raises(OSError, match="open it anew"):
            log.append(made(5))
        log.close()
        assert read(folder, "a") == bits(made(8))
        assert one_log(folder).name == "log-2.bin"


def test_what_comes_to_the_disk_first(folder, monkeypatch):
    """No power loss finds a manifest without the log that it tells of."""
    done = []

    def note(name, function):
        def noted(what, *rest):
            if name == "sync":
                done.append((name, os.fstat(what).st_ino))
            else:
                path = pathlib.Path(what)
                if path.exists():
                    done.append((name, path.stat().st_ino))
            return function(what, *rest)

        return noted

    with contextlib.closing(Log(folder, "a")) as log:
        monkeypatch.setattr(os, "fsync", note("sync", os.fsync))
        monkeypatch.setattr(os, "fdatasync", note("sync", os.fdatasync))
        monkeypatch.setattr(os, "replace", note("replace", os.replace))
        monkeypatch.setattr(os, "unlink", note("unlink", os.unlink))

        def steps():
            names = {
                path.stat().st_ino: path.suffix for path in folder.iterdir()
            }
            names[folder.stat().st_ino] = "folder"
            told = [(name, names.get(inode, "old")) for name, inode in done]
            done.clear()
            return told

        log.append(made(5))
        assert steps() == []
        log.flush()
        manifest = [
            ("sync", ".json"),
            ("replace", ".json"),
            ("sync", "folder"),
        ]
        assert steps() == [("sync", ".bin"), *manifest]
        log.flush()
        assert steps() == []
        log.rewrite(made(6))
        new = [("sync", ".bin"), ("sync", "folder")]
        assert steps() == [*new, *manifest, ("unlink", "old")]


@pytest.mark.parametrize("what", ["append", "rewrite"])
def test_ctrl_c(what, folder):
    def interrupted():
        yield from made(5, 6)
        raise KeyboardInterrupt

    with contextlib.closing(Log(folder, "a")) as log:
        before = files(folder)
        with pytest.raises(KeyboardInterrupt):
            getattr(log, what)(interrupted())
        assert files(folder) == before
        log.append(made(5))
    assert read(folder) == bits(made(*range(6)))


def test_ctrl_c_after_a_rewrite_was_committed(folder, monkeypatch):
    log = Log(folder, "a")
    replace = os.replace

    def interrupted(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.rewrite(made(8))
    with pytest.raises(OSError, match="open it anew"):
        log.append(made(9))
    log.close()
    assert read(folder, "a") == bits(made(8))


# Processes that are killed.

KILLED_ANYWHERE = (
    ALONE
    + """
import shutil
real = {name: getattr(os, name) for name in "write replace unlink".split()}
real["fsync"] = real["fdatasync"] = lambda descriptor: None  # for a kill
left = 0

def patched(name):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            if name == "write":
                half = len(arguments[1]) // 2
                real["write"](arguments[0], arguments[1][:half])
            os._exit(9)
        return real[name](*arguments)
    return call

def operations(*numbers):
    return [Operation(i, np.full((2, 3), i, "f4"), np.ones((2, 0), "f4"))
            for i in numbers]

def life(folder, done):
    "All that can be done to a store; `done` after each step."
    log = Log(folder, "a", {"a": 1}); done()
    log.append(operations(0, 1)); log.flush(); done()
    log.append(operations(2)); log.append(operations(3)); log.flush(); done()
    log.rewrite(operations(8, 9)); done()
    log.append(operations(10)); log.close(); done()
    durable.write(folder, {"a": 1}, operations(5)); done()
    durable.write(folder + "/new", {"a": 1}, operations(6)); done()

steps = [None, [], [0, 1], [0, 1, 2, 3], [8, 9], [8, 9, 10], [5], [5]]

def rows(folder, mode):
    if not durable.exists(folder):
        return None
    with contextlib.closing(Log(folder, mode)) as log:
        return [operation.row for operation in log.operations()]

for name in [*real]:
    setattr(os, name, patched(name))
kills = 0
while True:
    folder = f"{sys.argv[1]}/{kills}"
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        left = kills + 1
        life(folder, lambda: real["write"](theirs, b"."))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(theirs)
    done = len(os.read(ours, 100))
    os.close(ours)
    if status == 0:
        break
    # The step that was broken off may count already, but whole.
    found = rows(folder, "r")
    assert found in steps[done : done + 2], (kills, done, found)
    with contextlib.closing(Log(folder, "a", {"a": 1})) as log:
        assert [x.row for x in log.operations()] == (found or []), kills
        assert len(os.listdir(folder)) - os.path.isdir(folder + "/new") == 3
        log.append(operations(77))
    assert rows(folder, "r") == [*(found or []), 77], kills
    Log(folder + "/new", "a", {"a": 1}).close()
    assert rows(folder + "/new", "r") in ([], [6])
    kills += 1
print(kills)
"""
)


def test_a_writer_that_is_killed_anywhere(tmp_path):
    """Before or in the midst of each call that changes files."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_ANYWHERE, tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60


# Numbers its operations, and keeps the last 20 at each rewrite.
WRITER = (
    ALONE
    + """
folder, rewrites = sys.argv[1], int(sys.argv[2])

def numbered(*numbers):
    for i in numbers:
        keys = np.full((i % 50, 3), i, "f4")
        yield Operation(i, keys, keys[:, :2])

log = Log(folder, "a", {"width": 3})
count = max((operation.row + 1 for operation in log.operations()), default=0)
while True:
    print(count, flush=True)
    log.append(numbered(*range(count, count + 3)))
    log.append(numbered(*range(count + 3, count + 6)))
    log.flush()
    count += 6
    if rewrites and count % 30 == 0:
        log.rewrite(numbered(*range(max(count - 20, 0), count)))
"""
)


def check_numbered(operations, rewrites):
    """They follow each other, whole, from where a log may begin; gives the
    number of the next."""
    rows = [operation.row for operation in operations]
    start = rows[0] if rows else 0
    assert rows == list(range(start, start + len(rows)))
    assert start == 0 or rewrites and (start + 20) % 30 == 0
    for row, keys, values in operations:
        assert keys.shape == (row % 50, 3) and values.shape == (row % 50, 2)
        assert (keys == row).all() and (values == row).all()
    return start + len(rows)


def kill_a_writer(folder, kills, seconds, rewrites):
    """Kills one after another, with a reader beside them all."""
    rng = np.random.default_rng(kills)
    reader, seen, told, known = None, [], set(), 0
    for kill in range(kills):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, folder, str(int(rewrites))],
            stdout=subprocess.PIPE,
        ) as writer:
            first = writer.stdout.readline() if kill % 2 == 0 else b""
            end = time.monotonic() + rng.uniform(0, seconds)
            while time.monotonic() < end or (not kill and known < 60):
                assert writer.poll() is None
                if reader is None:
                    if durable.exists(folder):
                        reader = Log(folder, "r", {"width": 3})
                else:
                    news = reader.refresh()
                    told.add(news)
                    if news == "anew":
                        seen = []
                    seen += reader.operations()
                    count = check_numbered(seen, rewrites)
                    assert count >= known
                    known = count
            writer.kill()
            lines = (first + writer.stdout.read()).split(b"\n")[:-1]
        assert writer.returncode == -signal.SIGKILL
        if lines:
            known = max(known, int(lines[-1]))
        if not durable.exists(folder):
            continue
        with contextlib.closing(Log(folder, "r")) as log:
            count = check_numbered(list(log.operations()), rewrites)
        assert known <= count <= known + 6 and count % 6 == 0
    reader.close()
    assert told == ({None, "more", "anew"} if rewrites else {None, "more"})
    Log(folder, "a").close()
    assert sorted(files(folder))[0] == "lock" and len(files(folder)) == 3


def test_writers_that_are_killed(tmp_path):
    kill_a_writer(tmp_path / "store", 3, 0.3, rewrites=False)


@pytest.mark.slow
def test_many_writers_that_are_killed(tmp_path):
    kill_a_writer(tmp_path / "kept", 25, 1.0, rewrites=False)
    kill_a_writer(tmp_path / "rewritten", 50, 1.0, rewrites=True)


def test_no_pickle():
    """A store of somebody else runs no code."""
    text = SOURCE.read_text()
    names = {
        name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [
            getattr(node, "module", None),
            *(alias.name for alias in node.names),
        ]
    }
    assert "json" in names and "numpy" in names
    assert not names & {"pickle", "marshal", "shelve", "dill", "keras"}
    assert "pickle" not in text and "np.load" not in text
