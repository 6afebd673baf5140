"""Deduplication: of equal documents, or of near ones by MinHash, the first in input order is kept.

A near document is removed if it is at least as similar as the threshold to a kept one. The result depends on the input
order only, not on the batches or on which worker made the signatures. n: documents, P: permutations, B: bands of R
values each, e: entries (document, band).
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.builder.disk_hash_table import SPREAD, Bools, HashTable, Int64s, RowFile, UInt64s, hash_runs
from megalm.data.indexed.metadata import signatures_path
from megalm.data.readers.input_files import sha256_of
from megalm.errors import DataError

Dedup = Literal["none", "exact", "minhash"]
PERMUTATIONS = 64
SHINGLE_WORDS = 5
SEED, SCHEME = 1, "affine32"
BATCH = 4096
KEPT_PAIRS = 20
BAND_BITS = 7
Values = npt.NDArray[np.uint32]
# How the values of PREFIX.minhash were made, for PREFIX.json.
MADE = {"permutations": PERMUTATIONS, "shingle_words": SHINGLE_WORDS, "seed": SEED, "scheme": SCHEME}


class Pair(NamedTuple):
    """The numbers of two documents in input order, and their share of equal MinHash values."""

    left_out: int
    copy_of: int
    alike: float

    def named(self, name: Callable[[int], str]) -> dict[str, Any]:
        """Return an entry of `near_copies` in PREFIX.json, given the name of a document's number."""
        return {"left_out": name(self.left_out), "copy_of": name(self.copy_of), "alike": self.alike}


def check_threshold(share: float) -> float:
    """Return the threshold. Raises DataError if it is not a valid share."""
    if not 0 < share <= 1:
        raise DataError(f"--minhash-threshold {share}: give a share between 0 and 1, such as 0.8")
    return share


class Deduplicator:
    """Remembers documents; by itself it finds every document new.

    Attributes:
        pairs: the first near copies, each with the document that it is near.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        """Remember n documents; return [n] whether each is new."""
        return np.ones(len(signatures), dtype=np.bool_)


def exact_signatures(rows: Sequence[npt.NDArray[Any]]) -> UInt64s:
    """Return [n, 2] 128-bit hashes of token rows [tokens] of one dtype; equal texts have equal hashes."""
    digests = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


class ExactDeduplicator(Deduplicator):
    """Finds exact copies with a hash table in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._table = HashTable(path, key_columns=2)

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        keys = np.ascontiguousarray(signatures, dtype=np.uint64).reshape(-1, 2).copy()
        keys[~keys.any(axis=1)] = 1  # all zeros means an empty slot
        _, first = np.unique(keys, axis=0, return_index=True)
        first.sort()
        new = np.zeros(len(keys), dtype=np.bool_)
        new[first] = self._table.insert(keys[first])[1]
        return new


def minhash_signatures(texts: Sequence[str]) -> Values:
    """Return [n, P] the MinHash values of each text's set of five-word runs."""
    from datasketch import MinHash

    rows = np.empty((len(texts), PERMUTATIONS), dtype=np.uint32)
    minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=int, seed=SEED, scheme=SCHEME)
    for place, text in enumerate(texts):
        minhash.clear()
        minhash.update_batch(_shingles(text).tolist())
        rows[place] = minhash.hashvalues
    return rows


def _shingles(text: str) -> Values:
    """Return the distinct 32-bit hashes of the word runs; a short text has one."""
    words = np.array([zlib.crc32(word.encode()) for word in text.split()], dtype=np.uint64)
    if len(words) < SHINGLE_WORDS:
        return np.array([zlib.crc32(words.tobytes())], dtype=np.uint32)
    return np.unique((hash_runs(words, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32))


def bands_of(threshold: float) -> tuple[int, int]:
    """Return the (B, R) with the fewest false positives below the threshold and false negatives above it.

    Minimizes the area of both errors over all similarities, as datasketch's MinHashLSH does.
    """
    likeness = (np.arange(1000) + 0.5) / 1000
    best, least = (1, PERMUTATIONS), np.inf
    for bands in range(1, PERMUTATIONS + 1):
        for rows in range(1, PERMUTATIONS // bands + 1):
            missed = (1 - likeness**rows) ** bands
            error = float(np.where(likeness < threshold, 1 - missed, missed).sum())
            if error < least:
                best, least = (bands, rows), error
    return best


class MinHashDeduplicator(Deduplicator):
    """Finds near copies among the signatures of the kept documents.

    A table maps each band hash to the last document that has it; from there a chain leads to the earlier ones. All
    data is in the files PATH and PATH.rows.
    """

    def __init__(self, path: Path, threshold: float) -> None:
        super().__init__()
        self._threshold, self._count = threshold, 0
        self._bands, self._band_rows = bands_of(threshold)
        self._last = HashTable(path, key_columns=1, value_columns=1)  # row + 1
        row = [("number", "<i8"), ("values", "<u4", (PERMUTATIONS,)), ("earlier", "<u8", (self._bands,))]
        self._kept = RowFile(path.with_name(f"{path.name}.rows"), np.dtype(row))  # earlier: row + 1, or 0

    def add(self, signatures: npt.NDArray[Any]) -> Bools:
        new = np.zeros(len(signatures), dtype=np.bool_)
        for start in range(0, len(signatures), BATCH):
            batch = np.ascontiguousarray(signatures[start : start + BATCH], dtype=np.uint32)
            new[start : start + BATCH] = self._add(batch)
        return new

    def _add(self, values: Values) -> Bools:
        keys = self._band_keys(values)
        new = self._new_in_batch(values, keys, self._near_kept(values, keys))
        numbers = self._count + np.arange(len(values))
        self._remember(values[new], keys[new], numbers[new])
        for place in np.flatnonzero(~new)[: KEPT_PAIRS - len(self.pairs)]:
            self.pairs.append(self._pair(values[place], keys[place], int(numbers[place])))
        self._count += len(values)
        return new

    def _band_keys(self, values: Values) -> UInt64s:
        """Return [n, B] band hashes; the low bits are the band number from 1, so keys of two bands never collide."""
        keys: UInt64s = np.zeros((len(values), self._bands), dtype=np.uint64)
        bands = values[:, : self._bands * self._band_rows].reshape(len(values), self._bands, self._band_rows)
        for place in range(self._band_rows):
            keys = (keys ^ bands[:, :, place]) * np.uint64(SPREAD)
            keys ^= keys >> np.uint64(32)
        return (keys << np.uint64(BAND_BITS)) | np.arange(1, self._bands + 1, dtype=np.uint64)

    def _alike(self, some: Values, others: Values) -> Bools:
        return np.asarray((some == others).mean(axis=1) >= self._threshold)

    def _near_kept(self, values: Values, keys: UInt64s) -> Bools:
        """Return [n] whether a kept document of an earlier batch is near."""
        near = np.zeros(len(values), dtype=np.bool_)
        places = self._last.find(keys.reshape(-1, 1))
        entries = np.flatnonzero(places >= 0)
        document, band = np.divmod(entries, self._bands)
        rows, after = self._kept.rows, self._last.values[places[entries], 0].astype(np.int64)
        while len(after):
            near[document[self._alike(values[document], rows["values"][after - 1])]] = True
            after = rows["earlier"][after - 1, band].astype(np.int64)
            going = (after > 0) & ~near[document]
            document, band, after = document[going], band[going], after[going]
        return near

    def _new_in_batch(self, values: Values, keys: UInt64s, near: Bools) -> Bools:
        """Return [n] whether each document is kept; takes one round per link of the longest chain of shared bands.

        The first undecided document of a band leads it. A document that leads all its bands is kept, because no
        document before it can be near. Its followers are compared with it: near ones are removed, the others lose it as
        a leader.
        """
        new = np.zeros(len(values), dtype=np.bool_)
        document, _, key = self._entries(np.flatnonzero(~near), keys[~near])
        while len(document):
            first = np.append(True, key[1:] != key[:-1])
            leader = document[first][np.cumsum(first) - 1]
            follows, gone = np.zeros_like(new), np.zeros_like(new)
            follows[document[leader != document]] = True
            new[document[~follows[document]]] = True
            compared = np.flatnonzero(follows[document] & ~follows[leader] & (leader != document))
            alike = self._alike(values[document[compared]], values[leader[compared]])
            gone[document[compared[alike]]] = True
            undecided = follows[document] & ~gone[document]
            document, key = document[undecided], key[undecided]
        return new

    def _entries(self, documents: Int64s, keys: UInt64s) -> tuple[Int64s, Int64s, UInt64s]:
        """Return (document [e], band [e], key [e]), sorted by key and then by document."""
        document, band = np.repeat(documents, self._bands), np.tile(np.arange(self._bands), len(documents))
        order = np.argsort(keys.ravel(), kind="stable")
        return document[order], band[order], keys.ravel()[order]

    def _remember(self, values: Values, keys: UInt64s, numbers: Int64s) -> None:
        if not len(values):
            return
        start = len(self._kept)
        added = np.zeros(len(values), self._kept.rows.dtype)
        added["number"], added["values"] = numbers, values
        document, band, key = self._entries(np.arange(len(values)), keys)
        first, last = np.append(True, key[1:] != key[:-1]), np.append(key[1:] != key[:-1], True)
        places, _ = self._last.insert(key[first].reshape(-1, 1))
        earlier = np.append(0, start + document[:-1] + 1)
        earlier[first] = self._last.values[places, 0]
        added["earlier"][document, band] = earlier
        self._last.values[places, 0] = start + document[last] + 1
        self._kept.append(added)

    def _pair(self, value: Values, keys: UInt64s, number: int) -> Pair:
        """Return the pair with the earliest kept document that is near; rows are in input order."""
        places, candidates = self._last.find(keys.reshape(-1, 1)), set()
        for band in np.flatnonzero(places >= 0):
            after = int(self._last.values[places[band], 0])
            while after:
                candidates.add(after - 1)
                after = int(self._kept.rows["earlier"][after - 1, band])
        rows = self._kept.rows[sorted(candidates)]
        first = rows[self._alike(rows["values"], value[np.newaxis])][0]
        return Pair(number, int(first["number"]), float((first["values"] == value).mean()))


def make_deduplicator(dedup: Dedup, table: Path, threshold: float) -> Deduplicator:
    """Args: table: path for the table's files; their names begin with it."""
    if dedup == "exact":
        return ExactDeduplicator(table)
    return MinHashDeduplicator(table, threshold) if dedup == "minhash" else Deduplicator()


def open_signatures(prefix: str | Path, recorded: dict[str, Any], documents: int) -> npt.NDArray[Any]:
    """Map PREFIX.minhash, rows u32[P] in document order, as [documents, P]; reads them once to verify their hash.

    Args:
        recorded: `minhash` of PREFIX.json.

    Raises:
        DataError: the dataset has none, they were made another way, or they do not match the recorded hash.
    """
    path, again = signatures_path(prefix), "build it again with build_dataset.py --dedup minhash"
    if not recorded:
        raise DataError(f"{prefix}: was built without signatures, so its near copies cannot be found; {again}")
    if any(recorded.get(name) != value for name, value in MADE.items()):
        raise DataError(f"{path}: its signatures differ in kind from those of this version; {again}")
    if not path.exists():
        raise DataError(f"{path}: does not exist; copy it beside the dataset, or {again}")
    size = documents * PERMUTATIONS * 4
    if path.stat().st_size != size or sha256_of(str(path)) != recorded["sha256"]:
        raise DataError(
            f"{path}: does not match {prefix}.json ({size:,} bytes expected, {path.stat().st_size:,} found); "
            f"copy it again, or {again}"
        )
    if not documents:
        return np.zeros((0, PERMUTATIONS), dtype="<u4")
    return np.memmap(path, dtype="<u4", mode="r", shape=(documents, PERMUTATIONS))
