"""A memory on a disk: saved as a whole, or open in a folder that survives."""

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
BLOCK = 1 << 26  # bytes of entries that are stored together
FILE_FACTOR = 2  # a file larger than so many times its entries is rewritten
FILE_LEAST = 1 << 24  # bytes of a file that is never rewritten


class Durable:
    """The part of `KNNMemory` that reads and writes folders."""

    def save(self, folder: PathLike) -> None:
        """Writes all entries to a folder, in the place of a memory there.

        Whoever reads the folder finds the memory before or this one, whole,
        also if this process is killed.

        Args:
            folder: path; made where it is absent.

        Raises:
            OSError: it could not be written; what was there is there.
            ValueError: another process has it open for appending.
        """
        folder = check_path("folder", folder)
        with self._lock:
            operations = self._operations(self._count)
            Store(folder, "a", self._config(), operations).close()

    @classmethod
    def load(cls, folder: PathLike, **options: Any) -> Self:
        """The memory that `save` wrote, or that is written by `open`.

        Args:
            folder: path.
            **options: `search_method`, `target_recall`, `background` and
                `keep_statistics`, as of `KNNMemory`.

        Returns:
            `KNNMemory`, which is not connected with the folder.

        Raises:
            FileNotFoundError: there is no memory.
            ValueError: its files are damaged, or of a newer version.
        """
        memory = cls.open(folder, "r", **options)
        memory.close()
        memory._mode = None
        return memory

    @classmethod
    def open(cls, folder: PathLike, mode: str = "r", **options: Any) -> Self:
        """A memory whose entries are on a disk.

        With `mode="a"`, `flush` writes what was added and cleared to a file in
        the folder, where it survives a kill and a loss of power; only one
        process at a time can have it open so. With `mode="r"` any number of
        processes read what was flushed, also beside one that writes; `refresh`
        brings what was flushed since. A file that is larger than 16 MiB and
        twice its entries is written anew. A fork neither flushes nor
        refreshes. (On Windows nothing keeps a second process out.)

        The file, `memory.sqlite`, is one of SQLite. Readers write its index
        beside it, unless the folder is read-only.

        Args:
            folder: path; with `"a"` made where it is absent.
            mode: `"r"` (default) or `"a"`.
            **options: arguments of `KNNMemory`, for a new memory, or
                `search_method`, `target_recall`, `background`,
                `keep_statistics`;
                sizes and similarity must be those of a memory that is there.

        Returns:
            `KNNMemory`, all entries in RAM. `close` it, or use it in `with`.

        Raises:
            FileNotFoundError: there is no memory, and nothing to make one.
            ValueError: another process has it open for appending; its sizes or
                similarity are others; its files are damaged, or of a newer
                version. The files are as they were.
        """
        folder = check_path("folder", folder)
        check_one_of("mode", mode, MODES)
        is_new = mode == "a" and not exists(folder)
        if is_new and not {"key_dim", "memory_size"} <= set(options):
            raise FileNotFoundError(
                "There must be a memory in `folder`, or `key_dim` and "
                "`memory_size` to make one. Received: no memory in "
                f"{folder}, and {sorted(options)}"
            )
        config = cls(**options)._config() if is_new else None
        file = Store(folder, mode, config)
        try:
            config = file.config
            if set(config) != set(STORED):
                raise ValueError(
                    f"`folder` must be of a `KNNMemory`, with {STORED}. "
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
                        f"`{name}` must be that of the memory that is there; "
                        "for another, add its `entries` to a new one. "
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
        """Writes what was added and cleared since, and waits for the disk.

        Raises:
            OSError: the disk is full, say. Nothing is lost: the file is as it
                was, and what is in memory may be flushed again.
            ValueError: the memory is not open for appending.
        """
        with self._lock:
            if self._mode != "a":
                raise ValueError(
                    "`flush` needs a memory that is open for appending: "
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
        """Brings what another process has flushed since.

        Returns:
            bool, whether there was something.

        Raises:
            ValueError: the memory is not open for reading, or the files are
                damaged.
        """
        with self._lock:
            if self._mode != "r":
                raise ValueError(
                    "`refresh` needs a memory that is open for reading: "
                    '`KNNMemory.open(folder, "r")`. '
                    f"Received: mode={self._mode!r}"
                )
            operations = list(self._read_on())  # all, or an error and none
            for operation in operations:
                self._do(*operation)
            return bool(operations)

    def close(self) -> None:
        """Flushes, and lets other processes write. Searches still work."""
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
        """The latest entries, so many of each row, as a file has them."""
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
        """Operations that are in the file and not in this memory, checked."""
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
        least = 0 if len(keys) else -1  # which clears all rows
        is_sound = all(are_sound(part).all() for part in (keys, values))
        if not (least <= row < self.num_rows and is_sound):
            raise ValueError(
                "Stored entries must be finite, in rows of the memory. "
                f"Received: row {row}, in the file of {self!r}"
            )

    def _check_writable(self):
        if self._mode not in (None, "a"):
            raise ValueError(
                "A memory must be open for appending to be changed, or not "
                f"be connected with a folder. Received: mode={self._mode!r}"
            )
