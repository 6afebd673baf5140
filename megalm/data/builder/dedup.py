"""The deduplicator protocol, and exact deduplication by token hashes; near copies are found in minhash_dedup.py.

Of equal documents the first in input order is kept, whichever worker encoded it and when. n: documents.
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
    """Remembers documents. `pairs`: the first near copies, each with the document that it is near."""

    pairs: list[Pair]

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        """Remember n documents; return [n] whether each is new."""


class NoDedup:
    """Every document is new."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        return np.ones(len(signatures), dtype=np.bool_)


def exact_signatures(rows: Sequence[npt.NDArray[Any]]) -> UInt64s:
    """Return [n, 2] 128-bit hashes of token rows [tokens] of one dtype; equal texts have equal hashes."""
    digests = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


class ExactDeduplicator:
    """Finds exact copies with a hash table in a file."""

    def __init__(self, path: Path) -> None:
        self.pairs: list[Pair] = []
        self._table = HashTable(path, key_columns=2)

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        keys = np.ascontiguousarray(signatures, dtype=np.uint64).reshape(-1, 2).copy()
        keys[~keys.any(axis=1)] = 1  # all zeros means an empty slot
        _, first = np.unique(keys, axis=0, return_index=True)
        first.sort()
        new = np.zeros(len(keys), dtype=np.bool_)
        new[first] = self._table.insert(keys[first])[1]
        return new


def make_deduplicator(dedup: Dedup, table: Path, threshold: float) -> Deduplicator:
    """Args: table: path for the table's files; their names begin with it."""
    if dedup == "exact":
        return ExactDeduplicator(table)
    return MinHashDeduplicator(table, threshold) if dedup == "minhash" else NoDedup()
