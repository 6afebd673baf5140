"""A hash table and a row file on disk, so that memory does not grow with the number of documents.

The kernel writes out and drops their mapped pages. n: keys, C: slots of a hash table, K: columns of a key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.utils.atomic_files import writing_to

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
SMALLEST_TABLE = 1 << 12
MOVED_ROWS = 1 << 16
SPREAD = 0x9E3779B97F4A7C15  # an odd number near 2^64 divided by the golden ratio


def hash_runs(values: UInt64s, length: int) -> UInt64s:
    """Return [..., n - length + 1] hashes of the runs of `length` values in rows of [..., n]."""
    count = values.shape[-1] - length + 1
    mixed: UInt64s = np.zeros((*values.shape[:-1], count), dtype=np.uint64)
    for place in range(length):
        mixed = mixed * np.uint64(SPREAD) + values[..., place : place + count]
    return mixed


class HashTable:
    """A table with rows of u64: K key columns, not all zero, and value columns. Open addressing, linear probing."""

    def __init__(self, path: Path, key_columns: int, value_columns: int = 0) -> None:
        self._path, self._keys, self._width = path, key_columns, key_columns + value_columns
        self._count = 0
        self._table = self._new_table(SMALLEST_TABLE)

    @property
    def values(self) -> UInt64s:
        """[C, value columns], readable and writable by slot, initially zero; valid until the next `insert`."""
        return self._table[:, self._keys :]

    def find(self, keys: UInt64s) -> Int64s:
        """Return [n] the slots of the keys [n, K], -1 for a missing key."""
        return self._probe(self._table, keys, insert=False)[0]

    def insert(self, keys: UInt64s) -> tuple[Int64s, Bools]:
        """Insert distinct keys [n, K]; return (slots [n], whether each key is new [n])."""
        capacity = len(self._table)
        while 2 * (self._count + len(keys)) > capacity:
            capacity *= 2
        if capacity > len(self._table):
            self._move_to(capacity)
        places, new = self._probe(self._table, keys, insert=True)
        self._count += int(new.sum())
        return places, new

    def _probe(self, table: UInt64s, keys: UInt64s, insert: bool) -> tuple[Int64s, Bools]:
        """Probe for all keys at once, each from its home slot until it is found or a slot is empty."""
        found, new = np.full(len(keys), -1, dtype=np.int64), np.zeros(len(keys), dtype=np.bool_)
        pending, bits = np.arange(len(keys)), len(table).bit_length() - 1
        where = ((keys[:, 0] * np.uint64(SPREAD)) >> np.uint64(64 - bits)).astype(np.int64)
        while len(pending):
            held = table[where, : self._keys]
            empty = ~held.any(axis=1)
            if insert:
                table[where[empty], : self._keys] = keys[pending[empty]]
                held = table[where, : self._keys]  # of several keys for one slot, the last got it
            there = (held == keys[pending]).all(axis=1)
            new[pending[there & empty]] = True
            found[pending[there]] = where[there]
            searching = ~there if insert else ~(there | empty)
            pending, where = pending[searching], (where[searching] + 1) & (len(table) - 1)
        return found, new & insert

    def _move_to(self, capacity: int) -> None:
        old, self._table = self._table, self._new_table(capacity)
        for start in range(0, len(old), MOVED_ROWS):
            part = np.array(old[start : start + MOVED_ROWS])
            part = part[part[:, : self._keys].any(axis=1)]
            places, _ = self._probe(self._table, part[:, : self._keys], insert=True)
            self._table[places, self._keys :] = part[:, self._keys :]

    def _new_table(self, capacity: int) -> UInt64s:
        self._path.unlink(missing_ok=True)  # an old table stays readable while it is mapped
        return _mapped(self._path, np.dtype(np.uint64), (capacity, self._width))


class RowFile:
    """A file of rows of one dtype, appended and then read or changed in any order."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        path.unlink(missing_ok=True)
        self._path, self._count = path, 0
        self._all = _mapped(path, np.dtype(dtype), (SMALLEST_TABLE,))

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> npt.NDArray[Any]:
        """[len(self)], a view of the file; valid until the next `append`."""
        return self._all[: self._count]

    def append(self, rows: npt.NDArray[Any]) -> None:
        capacity = len(self._all)
        while self._count + len(rows) > capacity:
            capacity *= 2
        if capacity > len(self._all):
            self._all = _mapped(self._path, self._all.dtype, (capacity,))
        self._all[self._count : self._count + len(rows)] = rows
        self._count += len(rows)


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map the file, created or extended with zeros.

    The disk space is allocated at once: a full disk raises an error here instead of killing the process at a later
    write to the map.
    """
    with writing_to(path), path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, dtype.itemsize * int(np.prod(shape)))
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
