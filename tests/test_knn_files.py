"""Memories of nearest neighbours on disk.

`test_store.py` tests full disks, damage and kills.
"""

import contextlib
import functools
import re

import numpy as np
import pytest
from knn import SEARCH
from knn import SIZES_OF_FILE
from knn import Model
from knn import check_add
from knn import check_entries
from knn import check_search
from knn import check_statistics
from knn import contents
from knn import loaded
from knn import pair
from knn import random
from knn import refuses
from knn import run_threads
from knn import stored
from test_full_disk import files_of_at_most

from keras_memory.retrieval import durable
from keras_memory.retrieval import tuning
from keras_memory.retrieval.knn_memory import KNNMemory
from keras_memory.retrieval.store import Operation
from keras_memory.retrieval.store import Store


def files(folder):
    """Files of a folder, except those that SQLite keeps while it is open."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix not in (".sqlite-wal", ".sqlite-shm")
    }


def fill(memory, *others, n=5, seed=0):
    keys = random(3, n, 3, seed=seed)
    values = random(3, n, memory.value_dim, seed=seed + 1)
    for one in (memory, *others):
        one.add(keys, values)


@pytest.mark.parametrize("similarity, value_dim", [("dot", 0), ("l2", 2)])
def test_a_loaded_memory_equals_the_saved_one(
    store, similarity, value_dim, tmp_path
):
    sizes = 3, 7, 3, value_dim
    memory, model = pair(store, *sizes, similarity=similarity)
    other = "ring" if tuning.import_error() else "scann"
    other = {"ring": other, "scann": "ring"}[store]
    folder = tmp_path / "new" / "memory"
    queries = random(3, 2, 3)
    for step in range(4):  # no entries; some; around the end; cleared rows
        if step:
            fill(memory, model, n=4, seed=step)
        if step == 3:
            memory.clear([0, 2])
            model.clear([0, 2])
            arrays = random(1, 2, 3), random(1, 2, value_dim)
            check_add(memory, model, *arrays, rows=[2])
        memory.save(folder)
        copy = KNNMemory.load(
            folder, search_method=SEARCH[other], background=False
        )
        assert (
            copy._config() == memory._config()
            and copy.search_method == SEARCH[other]
        )
        check_entries(copy, model)
        # The memory is not connected to the file and continues.
        _, of_copy = pair("ring", *sizes, similarity=similarity)
        of_copy.rows = list(model.rows)
        of_copy.load()
        check_search(copy, of_copy, queries, 9)
        fill(copy, of_copy, n=3, seed=9)
        check_search(copy, of_copy, queries, 9)
        check_entries(memory, model)
        check_search(memory, model, queries, 9)
    assert sorted(files(folder)) == ["lock", "memory.sqlite"]


def test_saving_replaces_an_older_memory(tmp_path):
    old = KNNMemory(2, 500, num_rows=5, similarity="l2", search_method="exact")
    old.add(random(5, 400, 2), random(5, 400, 2))
    old.save(tmp_path)
    memory, model = pair("ring", **SIZES_OF_FILE)
    fill(memory, model)
    reader = stored(tmp_path, "r")
    memory.save(str(tmp_path))
    check_entries(loaded(tmp_path), model)
    assert len(files(tmp_path)["memory.sqlite"]) == 4 * 4096
    # Readers of the old memory keep it.
    for _ in range(2):
        with pytest.raises(ValueError, match='"key_dim": 2'):
            reader.refresh()
        assert contents(reader) == contents(old)


def test_statistics_start_at_loading(tmp_path):
    memory, model = pair("ring", **SIZES_OF_FILE)
    fill(memory, model)
    memory.save(tmp_path)
    kept = {"search_method": "exact", "keep_statistics": True}
    copy = KNNMemory.load(tmp_path, **kept)
    check_statistics(copy, model)
    check_search(copy, model, random(3, 2, 3), 2)
    check_statistics(copy, model)


def test_missing_memories_and_wrong_modes_are_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        for call in (KNNMemory.load, stored, KNNMemory.open):
            with pytest.raises((FileNotFoundError, NotADirectoryError)):
                call(folder)
    assert list(files(tmp_path)) == ["file"]
    with pytest.raises(ValueError, match="`mode` must .*mode='w'"):
        stored(tmp_path, "w")
    with pytest.raises(ValueError, match="`key_dim` must .*key_dim=0"):
        stored(tmp_path / "new", key_dim=0, memory_size=5)
    with pytest.raises(TypeError, match="color"):
        stored(tmp_path / "new", key_dim=3, memory_size=5, color="red")
    assert not (tmp_path / "new").exists()


def test_a_damaged_memory_is_refused(tmp_path):
    memory, model = pair("ring", **SIZES_OF_FILE)
    fill(memory, model)
    memory.save(tmp_path)
    path = tmp_path / "memory.sqlite"
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    before = files(tmp_path)
    for call in (loaded, stored, lambda x: stored(x, **SIZES_OF_FILE)):
        with pytest.raises(ValueError, match="memory.sqlite.*Received: "):
            call(tmp_path)
    assert files(tmp_path) == before
    path.unlink()
    memory.save(tmp_path)
    check_entries(loaded(tmp_path), model)


SAME = {**SIZES_OF_FILE, "similarity": "dot", "value_dtype": "float32"}
OF_OTHERS = {
    "other-sizes": ({"key_width": 2}, []),
    "a-size-more": ({**SAME, "heads": 2}, []),
    "a-size-less": (SIZES_OF_FILE, []),
    "a-size-of-another-kind": ({**SAME, "key_dim": "3"}, []),
    "no-such-row": (SAME, [(3, 3, 2, 1.0)]),
    "no-row": (SAME, [(-1, 3, 2, 1.0)]),
    "another-width": (SAME, [(0, 5, 2, 1.0)]),
    "one-wide": (SAME, [(0, 1, 1, 1.0)]),
    "a-nan": (SAME, [(0, 3, 2, np.nan)]),
    "too-large": (SAME, [(0, 3, 2, 1e20)]),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_a_foreign_store_is_refused(name, tmp_path):
    config, operations = OF_OTHERS[name]
    operations = [
        Operation(
            row,
            np.full((2, width), number, "float32"),
            np.full((2, value_width), number, "float32"),
        )
        for row, width, value_width, number in operations
    ]
    Store(tmp_path, "a", config, operations).close()
    with pytest.raises(ValueError, match="Received: "):
        loaded(tmp_path)


def test_numpy_sizes_are_saved(tmp_path):
    memory = KNNMemory(np.int64(3), np.int32(7), search_method="exact")
    memory.add(random(1, 2, 3), random(1, 2, 3))
    memory.save(tmp_path)
    assert contents(loaded(tmp_path)) == contents(memory)


def test_a_memory_is_created_and_reopened(tmp_path):
    folder = tmp_path / "of" / "it"
    model = Model(**SIZES_OF_FILE)
    with stored(folder, **SIZES_OF_FILE) as memory:
        fill(memory, model)
        check_entries(memory, model)
        check_entries(stored(folder, "r"), Model(**SIZES_OF_FILE))
        memory.flush()
        check_entries(stored(folder, "r"), model)
    some = {"key_dim": 3, "memory_size": 7, "similarity": "dot"}
    for options in ({}, some, SIZES_OF_FILE):
        with stored(folder, **options) as memory:
            check_entries(memory, model)
            fill(memory, model, seed=len(options))
            memory.clear([1])
            model.clear([1])
            check_search(memory, model, random(3, 2, 3), 3)
        with stored(folder, "r", **options) as memory:
            check_entries(memory, model)
    before = files(folder)
    for name, value, shown in (
        ("key_dim", 4, 4),
        ("memory_size", 8, 8),
        ("num_rows", 1, 1),
        ("value_dim", None, 3),
        ("similarity", "l2", "l2"),
    ):
        told = f"`{name}` must .* {name}={shown!r}, and {name}="
        told += f"{SAME[name]!r} in {re.escape(str(folder))}"
        for mode in ("a", "r"):
            with pytest.raises(ValueError, match=told):
                stored(folder, mode, **{**SIZES_OF_FILE, name: value})
        assert files(folder) == before
    with stored(folder) as memory:  # each failure has unlocked it
        check_entries(memory, model)


def test_readers_follow_the_only_writer(tmp_path):
    model, seen = Model(**SIZES_OF_FILE), Model(**SIZES_OF_FILE)
    queries = random(3, 2, 3)
    memory = stored(tmp_path, **SIZES_OF_FILE)
    for call in (stored, memory.save, KNNMemory(**SIZES_OF_FILE).save):
        with pytest.raises(ValueError, match="Only one writer at a time"):
            call(tmp_path)
    reader = stored(tmp_path, "r")
    assert reader.refresh() is False
    for step in range(4):
        fill(memory, model, seed=step)
        if step % 2:
            memory.clear([step % 3])
            model.clear([step % 3])
        assert reader.refresh() is False
        memory.flush()
        check_entries(reader, seen)
        assert reader.refresh() is True
        seen.rows = [list(entries) for entries in model.rows]
        check_entries(reader, seen)
        check_search(memory, model, queries, 3)
        found, other = (one.search(queries, 3) for one in (reader, memory))
        assert all((a == b).all() for a, b in zip(found, other))
    memory.flush()
    assert reader.refresh() is False
    refuses(lambda: fill(reader), "open for appending", "mode='r'")
    refuses(reader.clear, "open for appending", "mode='r'")
    refuses(reader.flush, "open for appending", "mode='r'")
    refuses(memory.refresh, "open for reading", "mode='a'")
    check_entries(reader, seen)
    # A copy in another folder is independent.
    reader.save(tmp_path / "copy")
    check_entries(loaded(tmp_path / "copy"), seen)
    memory.close()
    with stored(tmp_path) as memory:
        check_entries(memory, model)
        check_search(reader, model, queries, 3)
    reader.close()


def test_a_memory_without_a_folder_can_be_closed():
    memory, model = pair("ring", **SIZES_OF_FILE)
    refuses(memory.flush, "appending to be flushed", "mode=None")
    refuses(memory.refresh, "reading to be refreshed", "mode=None")
    memory.close()
    memory.close()
    fill(memory, model)
    with memory as same:
        assert same is memory
    check_entries(memory, model)


def test_a_closed_memory_refuses_calls(tmp_path):
    model = Model(**SIZES_OF_FILE)
    memory = stored(tmp_path / "a", **SIZES_OF_FILE)
    fill(memory, model)
    memory.close()
    memory.close()
    check_search(memory, model, random(3, 2, 3), 3)
    check_entries(memory, model)
    refuses(lambda: fill(memory), "open for appending", "mode='closed'")
    refuses(memory.clear, "open for appending", "mode='closed'")
    refuses(memory.flush, "appending to be flushed", "mode='closed'")
    refuses(memory.refresh, "reading to be refreshed", "mode='closed'")
    memory.save(tmp_path / "b")
    check_entries(loaded(tmp_path / "b"), model)
    # An error inside `with` loses no entries.
    with pytest.raises(ZeroDivisionError), stored(tmp_path / "a") as memory:
        fill(memory, model, seed=5)
        raise ZeroDivisionError
    with stored(tmp_path / "a", "r") as memory:
        check_entries(memory, model)
    check_search(memory, model, random(3, 2, 3), 3)
    refuses(memory.refresh, "reading to be refreshed", "mode='closed'")


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_a_full_disk_keeps_the_flushed_entries(
    is_rewritten, tmp_path, monkeypatch
):
    sizes = {**SIZES_OF_FILE, "memory_size": 4000}
    model = Model(**sizes)
    memory = stored(tmp_path, **sizes)
    fill(memory, model)
    memory.flush()
    before = contents(memory)
    memory.clear([1])
    model.clear([1])
    if is_rewritten:
        monkeypatch.setattr(durable, "FILE_LEAST", 0)
        monkeypatch.setattr(durable, "FILE_FACTOR", 0)
    for seed in range(2):
        fill(memory, model, n=1000, seed=seed)
        for call in (memory.flush, memory.flush, memory.close):
            with pytest.raises(OSError, match="needs space"):
                with files_of_at_most(40_000):
                    call()
        assert contents(loaded(tmp_path)) == before
        check_entries(memory, model)
        check_search(memory, model, random(3, 2, 3), 3)
        with pytest.raises(ValueError, match="Only one writer"):
            stored(tmp_path)
        memory.flush()
        before = contents(memory)
        assert contents(loaded(tmp_path)) == before
    memory.close()
    check_entries(loaded(tmp_path), model)


def file_size(folder):
    return (folder / "memory.sqlite").stat().st_size


def test_a_file_does_not_grow_without_bound(tmp_path, monkeypatch):
    least = 1 << 22  # the size of SQLite's log beside the file
    monkeypatch.setattr(durable, "FILE_LEAST", least)
    sizes = {
        "key_dim": 600,
        "memory_size": 400,
        "num_rows": 2,
        "value_dim": 400,
    }
    of_entries = 4 * (600 + 400) * 400 * 2
    with stored(tmp_path, **sizes) as memory, stored(tmp_path, "r") as reader:
        numbers = [0]
        for step in range(50):  # 20 times the memory's size
            memory.add(random(2, 160, 600, seed=step), random(2, 160, 400))
            memory.flush()
            assert reader.refresh()
            numbers.append(file_size(tmp_path))
        assert contents(reader) == contents(memory)
        assert of_entries < max(numbers) < 2 * of_entries + least
        assert sum(b < a for a, b in zip(numbers, numbers[1:])) > 5
        assert contents(loaded(tmp_path)) == contents(memory)
        monkeypatch.setattr(durable, "FILE_LEAST", 0)
        memory.clear()
        memory.flush()
        assert file_size(tmp_path) < 20_000
    assert contents(loaded(tmp_path)) == contents(memory)


def test_only_new_entries_are_written(tmp_path):
    """Entries overwritten or cleared before a flush are not written."""
    model = Model(**SIZES_OF_FILE)
    with stored(tmp_path, **SIZES_OF_FILE) as memory:
        for step in range(100):
            fill(memory, model, seed=step)
        memory.clear([1])
        model.clear([1])
        memory.flush()
        fill(memory, model, n=2)
    with contextlib.closing(Store(tmp_path, "r")) as store:
        counts = [(x.row, len(x.keys)) for x in store.operations(3, 2, "f4")]
    clear = [(1, 0)]
    once = [(0, 7), (2, 7)]
    assert counts == [(-1, 0), *clear, *once, (0, 2), (1, 2), (2, 2)]
    check_entries(loaded(tmp_path), model)


def test_large_rows_are_stored_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "BLOCK", 45)  # two entries
    model = Model(**SIZES_OF_FILE)
    with stored(tmp_path, **SIZES_OF_FILE) as memory:
        fill(memory, model)
    with contextlib.closing(Store(tmp_path, "r")) as store:
        counts = [len(x.keys) for x in store.operations(3, 2, "f4")]
    assert counts == [0, *[2, 2, 1] * 3]
    check_entries(loaded(tmp_path), model)


def test_readers_follow_a_rewritten_file(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "FILE_LEAST", 0)
    monkeypatch.setattr(durable, "FILE_FACTOR", 0)
    model = Model(**SIZES_OF_FILE)
    memory = stored(tmp_path, **SIZES_OF_FILE)
    with memory, stored(tmp_path, "r") as reader:
        for step in range(4):  # never full
            fill(memory, model, n=2, seed=step)
            memory.flush()
            assert reader.refresh()
            check_entries(reader, model)
            if step == 2:
                memory.clear([0, 2])
                model.clear([0, 2])


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_a_reader_recovers_from_damage(is_rewritten, tmp_path, monkeypatch):
    model = Model(**SIZES_OF_FILE)
    with stored(tmp_path, **SIZES_OF_FILE) as memory:
        fill(memory, model)
        memory.flush()
        reader = stored(tmp_path, "r")
        fill(memory, seed=3)
        if is_rewritten:
            monkeypatch.setattr(durable, "FILE_LEAST", 0)
            monkeypatch.setattr(durable, "FILE_FACTOR", 0)
    path = tmp_path / "memory.sqlite"
    data, last = path.read_bytes(), memory.entries(2)[1].tobytes()[-20:]
    assert data.count(last) == 1
    path.write_bytes(data.replace(last, bytes(20)))
    for _ in range(2):
        refuses(reader.refresh, "must be", "checksum")
        check_entries(reader, model)
    path.write_bytes(data)
    assert reader.refresh()
    assert contents(reader) == contents(memory)


def test_threads_can_add_and_flush_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "FILE_LEAST", 20_000)
    sizes = {"key_dim": 3, "memory_size": 40, "num_rows": 3, "value_dim": 2}
    memory = stored(tmp_path, **sizes)

    def work(row):
        for step in range(60):
            n = step % 5
            arrays = random(1, n, 3, seed=step), random(1, n, 2)
            memory.add(*arrays, rows=[row])
            if step % 7 == row:
                memory.flush()
            if step % 29 == 11 + row:
                memory.clear([row])

    run_threads([functools.partial(work, row) for row in range(3)])
    memory.close()
    assert contents(loaded(tmp_path)) == contents(memory)
    assert all(size > 20 for size in memory.size())
