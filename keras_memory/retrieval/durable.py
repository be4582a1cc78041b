"""Memories on disk: saved as a whole, or kept open in a folder."""

import itertools
import os
from typing import Any
from typing import Self

import numpy as np

from keras_memory.checks import check_one_of
from keras_memory.files import check_path
from keras_memory.hints import PathLike
from keras_memory.retrieval.entries import are_sound
from keras_memory.retrieval.entries import check_value_dtype
from keras_memory.retrieval.store import Operation
from keras_memory.retrieval.store import Store
from keras_memory.retrieval.store import exists

MODES = ("r", "a")
STORED = ("key_dim", "memory_size", "num_rows", "value_dim", "similarity")
STORED += ("value_dtype",)
BLOCK = 1 << 26  # bytes of entries in one stored operation
FILE_FACTOR = 2  # a file this many times larger than its entries is rewritten
FILE_LEAST = 1 << 24  # bytes; a smaller file is never rewritten


class Durable:
    """The part of `KNNMemory` that reads and writes folders."""

    def save(self, folder: PathLike) -> None:
        """Writes all entries to a folder, replacing any memory in it.

        A reader of the folder sees the old memory or the new one, never a
        mixture, even if this process is killed.

        Args:
            folder: path; created if absent.

        Raises:
            OSError: the write failed; the folder is unchanged.
            ValueError: another process has it open for appending.
        """
        folder = check_path("folder", folder)
        with self._lock:
            operations = self._operations(self._count)
            Store(folder, "a", self._config(), operations).close()

    @classmethod
    def load(cls, folder: PathLike, **options: Any) -> Self:
        """Reads a memory written by `save`, or by `open` and `flush`.

        Args:
            folder: path.
            **options: `search_method`, `target_recall`, `background` and
                `keep_statistics`; see `KNNMemory`.

        Returns:
            `KNNMemory`, not connected to the folder.

        Raises:
            FileNotFoundError: the folder holds no memory.
            ValueError: its files are damaged, or of a newer version.
        """
        memory = cls.open(folder, "r", **options)
        memory.close()
        memory._mode = None
        return memory

    @classmethod
    def open(cls, folder: PathLike, mode: str = "r", **options: Any) -> Self:
        """Opens a memory whose entries are on disk.

        With `mode="a"`, `flush` writes additions and clears to a file in the
        folder, which survives a kill and a loss of power. Only one process at
        a time can open a folder for appending. (On Windows a second process is
        not kept out.) With `mode="r"`, any number of processes read the flushed
        entries, also while another process writes; `refresh` reads later
        flushes. A file that exceeds both 16 MiB and twice the size of its
        entries is rewritten. A fork neither flushes nor refreshes.

        The file, `memory.sqlite`, is an SQLite database. Readers write its
        index beside it, unless the folder is read-only.

        Args:
            folder: path; with `"a"` created if absent.
            mode: `"r"` (default) or `"a"`.
            **options: for a new memory, arguments of `KNNMemory`. For an
                existing one, `search_method`, `target_recall`, `background`
                and `keep_statistics`; sizes, similarity and `value_dtype`, if
                given, must match the stored ones.

        Returns:
            `KNNMemory`, all entries in RAM. `close` it, or use it in `with`.

        Raises:
            FileNotFoundError: the folder holds no memory, and `options` do not
                suffice to create one.
            ValueError: another process has it open for appending; sizes,
                similarity or `value_dtype` differ from the stored ones; its
                files are damaged, or of a newer version. The files stay
                unchanged.
        """
        folder = check_path("folder", folder)
        check_one_of("mode", mode, MODES)
        is_new = mode == "a" and not exists(folder)
        if is_new and not {"key_dim", "memory_size"} <= set(options):
            raise FileNotFoundError(
                "`folder` must hold a memory, or `key_dim` and `memory_size` "
                "must be given to create one. Received: no memory in "
                f"{folder}, and {sorted(options)}"
            )
        config = cls(**options)._config() if is_new else None
        file = Store(folder, mode, config)
        try:
            config = file.config
            if set(config) != set(STORED):
                raise ValueError(
                    f"`folder` must hold a `KNNMemory`, with {STORED}. "
                    f"Received: {folder}, with {tuple(config)}"
                )
            for name, stored in config.items():
                given = options.get(name, stored)
                if name == "value_dim" and given is None:
                    given = options.get("key_dim", config["key_dim"])
                if name == "value_dtype":
                    given = check_value_dtype(given, False, "float32")
                if given != stored:
                    raise ValueError(
                        f"`{name}` must match the stored memory; to change it, "
                        "pass the stored `memory.entries(row)` to `add` of a "
                        "new memory. "
                        f"Received: {name}={given!r}, and {name}={stored!r} in "
                        f"{folder}"
                    )
            memory = cls(**{**options, **config})
            memory._file, memory._mode = file, mode
            with memory._lock:
                for operation in memory._read_on():
                    memory._do(*operation)
                memory._all_is_stored()
        except BaseException:
            file.close()
            raise
        return memory

    def flush(self) -> None:
        """Writes additions and clears since the last flush; waits for the disk.

        Raises:
            OSError: for example, the disk is full. Nothing is lost: the file
                is unchanged, and `flush` may be called again.
            ValueError: the memory is not open for appending.
        """
        with self._lock:
            if self._mode != "a":
                raise ValueError(
                    "The memory must be open for appending to be flushed: "
                    '`KNNMemory.open(folder, "a")`. '
                    f"Received: mode={self._mode!r}"
                )
            new = self._count - self._stored_count
            if not (new.any() or self._is_cleared.any()):
                return
            new_bytes, all_bytes = (
                int(np.minimum(counts, self.memory_size).sum())
                * self._bytes_of_entry
                for counts in (new, self._count)
            )
            limit = max(FILE_LEAST, FILE_FACTOR * all_bytes)
            if self._file.path.stat().st_size + new_bytes > limit:
                self._file.commit(self._operations(self._count), replace=True)
            else:
                cleared = map(self._cleared, np.flatnonzero(self._is_cleared))
                operations = itertools.chain(cleared, self._operations(new))
                self._file.commit(operations)
            self._all_is_stored()

    def _all_is_stored(self):
        self._stored_count[:] = self._count
        self._is_cleared[:] = False

    def refresh(self) -> bool:
        """Reads the entries that another process has flushed since.

        Returns:
            bool, whether there were any changes.

        Raises:
            ValueError: the memory is not open for reading, or the files are
                damaged.
        """
        with self._lock:
            if self._mode != "r":
                raise ValueError(
                    "The memory must be open for reading to be refreshed: "
                    '`KNNMemory.open(folder, "r")`. '
                    f"Received: mode={self._mode!r}"
                )
            operations = list(self._read_on())  # may raise, before any change
            for operation in operations:
                self._do(*operation)
            return bool(operations)

    def close(self) -> None:
        """Flushes, and releases the folder to other writers.

        Searches still work; `add` and `clear` raise ValueError. Without a
        folder `close` does nothing.
        """
        with self._lock:
            if self._file is not None:
                if self._mode == "a" and self._file.owner == os.getpid():
                    self.flush()
                self._file.close()
                self._file, self._mode = None, "closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _config(self):
        return {name: getattr(self, name) for name in STORED}

    @property
    def _bytes_of_entry(self):
        of_key = self.key_dim * self._keys.itemsize
        return of_key + self.value_dim * self._values.itemsize

    def _operations(self, counts):
        """The latest `counts[row]` entries of each row, as `Operation`s."""
        step = max(1, BLOCK // self._bytes_of_entry)
        for row in np.flatnonzero(counts):
            slots = self._slots(row)[-counts[row] :]
            for begin in range(0, len(slots), step):
                block = slots[begin : begin + step]
                arrays = self._keys[row, block], self._values[row, block]
                yield Operation(row, *arrays)

    def _cleared(self, row):
        return Operation(row, self._keys[row, :0], self._values[row, :0])

    def _read_on(self):
        """Checked operations in the file that this memory has not read yet."""
        sizes = self.key_dim, self.value_dim, self._values.dtype
        for operation in self._file.operations(*sizes):
            self._check_stored(*operation)
            yield operation

    def _do(self, row, keys, values):
        if len(keys):
            self._add(row, keys, values)
        else:
            for each in range(self.num_rows) if row < 0 else [row]:
                self._clear(each)

    def _check_stored(self, row, keys, values):
        least = 0 if len(keys) else -1  # row -1 clears all rows
        is_sound = all(are_sound(part).all() for part in (keys, values))
        if not (least <= row < self.num_rows and is_sound):
            raise ValueError(
                "Stored entries must be finite, and in rows of the memory. "
                f"Received: row {row}, in the file of {self!r}"
            )

    def _check_writable(self):
        if self._mode not in (None, "a"):
            raise ValueError(
                "The memory must be open for appending to be changed: "
                '`KNNMemory.open(folder, "a")`. '
                f"Received: mode={self._mode!r}"
            )
