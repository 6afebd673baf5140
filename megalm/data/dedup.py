"""Which documents came before: exact copies by a hash of their tokens, near ones by MinHash.

Of equal documents the first one in the order of the input is kept, whoever encoded it and when.
n documents, P permutations of MinHash.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Dedup = Literal["none", "exact", "minhash"]
Bools = npt.NDArray[np.bool_]
UInt64s = npt.NDArray[np.uint64]
SMALLEST_TABLE = 1 << 12
PERMUTATIONS = 64
SHINGLE_WORDS = 5
SEED, SCHEME = 1, "affine32"


class Seen(Protocol):
    """Remembers documents."""

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        """[n] whether each of the n documents is the first of its kind; they are remembered."""


class Nothing:
    """Every document is new."""

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        return np.ones(len(signatures), dtype=np.bool_)


def exact_signatures(rows: Sequence[npt.NDArray[Any]]) -> UInt64s:
    """[n, 2] hashes of 128 bits, of tokens [tokens] of one dtype: equal texts have equal ones."""
    digests = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


class SeenExactly:
    """A hash table of [capacity, 2] in a file, so that memory does not grow with the number of documents."""

    def __init__(self, path: Path) -> None:
        self._path, self._count = path, 0
        self._table = self._new_table(SMALLEST_TABLE)

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        keys = np.ascontiguousarray(signatures, dtype=np.uint64).reshape(-1, 2).copy()
        keys[~keys.any(axis=1)] = 1  # nothing but zeros means an empty place
        _, first = np.unique(keys, axis=0, return_index=True)
        first.sort()
        new = np.zeros(len(keys), dtype=np.bool_)
        self._make_room(len(first))
        new[first] = self._insert(self._table, keys[first])
        self._count += int(new.sum())
        return new

    @staticmethod
    def _insert(table: UInt64s, keys: UInt64s) -> Bools:
        """[n] whether each of the keys, all different, was not there; linear probing, all at once."""
        new = np.zeros(len(keys), dtype=np.bool_)
        pending = np.arange(len(keys))
        places = keys[:, 0] & np.uint64(len(table) - 1)
        while len(pending):
            wanted, where = keys[pending], places[pending]
            empty = ~table[where].any(axis=1)
            table[where[empty]] = wanted[empty]  # of several that want one place the last gets it
            there = (table[where] == wanted).all(axis=1)
            new[pending[there & empty]] = True
            pending = pending[~there]
            places[pending] = (places[pending] + np.uint64(1)) & np.uint64(len(table) - 1)
        return new

    def _make_room(self, more: int) -> None:
        capacity = len(self._table)
        while 2 * (self._count + more) > capacity:
            capacity *= 2
        if capacity > len(self._table):
            old, self._table = self._table, self._new_table(capacity)
            for start in range(0, len(old), 1 << 16):
                part = old[start : start + (1 << 16)]
                self._insert(self._table, np.array(part[part.any(axis=1)]))

    def _new_table(self, capacity: int) -> UInt64s:
        self._path.unlink(missing_ok=True)  # an old table stays readable until it is let go of
        return np.memmap(self._path, dtype=np.uint64, mode="w+", shape=(capacity, 2))


def minhash_signatures(texts: Sequence[str]) -> npt.NDArray[np.uint32]:
    """[n, P] MinHash values of the sets of runs of five words."""
    from datasketch import MinHash

    rows = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=int, seed=SEED, scheme=SCHEME)
    for place, text in enumerate(texts):
        minhash.clear()
        minhash.update_batch(_shingles(text).tolist())
        rows[place] = minhash.hashvalues
    return rows


def _shingles(text: str) -> npt.NDArray[np.uint32]:
    """Different hashes of 32 bits, one for each run of words; of a short text one."""
    words = np.array([zlib.crc32(word.encode()) for word in text.split()], dtype=np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.array([zlib.crc32(words.tobytes())], dtype=np.uint32)
    count = len(words) - SHINGLE_WORDS + 1
    mixed: UInt64s = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE_WORDS):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[place : place + count]
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


class SeenNearly:
    """datasketch's index of MinHash values, in memory: about 3 KB a document."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._rows: list[npt.NDArray[np.uint32]] = []

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        return np.array([self._add(row) for row in signatures], dtype=np.bool_)

    def _add(self, row: npt.NDArray[np.uint32]) -> bool:
        from datasketch import LeanMinHash

        minhash = LeanMinHash(seed=SEED, hashvalues=row, scheme=SCHEME)
        # The index gives candidates; their values say how alike they are.
        for key in self._index.query(minhash):
            if float((self._rows[key] == row).mean()) >= self._threshold:
                return False
        self._index.insert(len(self._rows), minhash)
        self._rows.append(row)
        return True


def seen_of(dedup: Dedup, table: Path, threshold: float) -> Seen:
    if dedup == "exact":
        return SeenExactly(table)
    return SeenNearly(threshold) if dedup == "minhash" else Nothing()
