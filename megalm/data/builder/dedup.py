"""Which documents came before: exact copies by a hash of their tokens; near ones are the business of near.py.

Of equal documents the first one in the order of the input is kept, whoever encoded it and when. n documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megalm.data.builder.disk_hash_table import Bools, HashTable, UInt64s
from megalm.data.builder.minhash_dedup import MinHashDeduplicator, Pair

Dedup = Literal["none", "exact", "minhash"]


class Deduplicator(Protocol):
    """Remembers documents. `pairs`: the first near copies, and what they are like."""

    pairs: list[Pair]

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        """[n] whether each of the n documents is the first of its kind; they are remembered."""


class NoDedup:
    """Every document is new."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        return np.ones(len(signatures), dtype=np.bool_)


def exact_signatures(rows: Sequence[npt.NDArray[Any]]) -> UInt64s:
    """[n, 2] hashes of 128 bits, of tokens [tokens] of one dtype: equal texts have equal ones."""
    digests = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


class ExactDeduplicator:
    """A hash table in a file."""

    def __init__(self, path: Path) -> None:
        self.pairs: list[Pair] = []
        self._table = HashTable(path, key_columns=2)

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        keys = np.ascontiguousarray(signatures, dtype=np.uint64).reshape(-1, 2).copy()
        keys[~keys.any(axis=1)] = 1  # nothing but zeros means an empty place
        _, first = np.unique(keys, axis=0, return_index=True)
        first.sort()
        new = np.zeros(len(keys), dtype=np.bool_)
        new[first] = self._table.insert(keys[first])[1]
        return new


def make_deduplicator(dedup: Dedup, table: Path, threshold: float) -> Deduplicator:
    """Args: table: where files may be made, under this name and names that begin with it."""
    if dedup == "exact":
        return ExactDeduplicator(table)
    return MinHashDeduplicator(table, threshold) if dedup == "minhash" else NoDedup()
