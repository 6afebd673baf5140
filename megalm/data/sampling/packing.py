"""Best-fit packing: samples of whole documents, in which no document is cut that fits one.

Legend: L sequence length, P pieces, F full samples, S samples. A piece is a document, or what is left of one, of n
tokens; its first token is no label, so it has n - 1. Its (n - 1) // L full samples are cut off, each beginning with the
token that the one before ends with. What remains, less than L labels, goes with others into a sample of up to L + 1
tokens by best fit decreasing: the longest first, each into the fullest sample that has room for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.index_cache import ArrayCache, Arrays
from megalm.data.sampling.sample_order import (
    Int64s,
    Place,
    Range,
    permutation,
    random_state,
    shuffled_samples,
)
from megalm.errors import DataError

PACKING_VERSION = 1
# Pieces that are packed together, which bounds the memory; more of them hardly lower the padding.
WINDOW_PIECES = 1 << 20
_PURPOSE_REST, _PURPOSE_PIECES = 2, 3  # of random_state; 0 and 1 are in sample_order.py

Ints = npt.NDArray[np.integer]


class Pieces(NamedTuple):
    """Runs of a dataset's tokens: the first token of each, in units of `unit` [P], and lengths in tokens [P]."""

    firsts: Int64s
    lengths: Ints
    unit: int = 1


class Packing:
    """Pieces in samples of up to L + 1 tokens, the full ones first. A piece of one token has no label: left out.

    Args:
        arrays: the result of `pack` for these pieces.

    Attributes:
        tokens: positions of all samples that are not padding: L a full sample, one less than its tokens another.
    """

    def __init__(self, pieces: Pieces, sequence_length: int, arrays: Arrays) -> None:
        self._pieces, self._length = pieces, sequence_length
        self._full_ends, self._packed, self._bounds = arrays["full_ends"], arrays["packed"], arrays["bounds"]
        self._sizes = arrays["sizes"]
        self._full = int(self._full_ends[-1]) if len(self._full_ends) else 0
        self.tokens = self._full * sequence_length + int(self._sizes.sum(dtype=np.int64)) - len(self._sizes)

    def __len__(self) -> int:
        return self._full + len(self._sizes)

    @property
    def padding_share(self) -> float:
        """The part of all positions that holds no token, 0 to 1."""
        return 1 - self.tokens / max(1, len(self) * self._length)

    def size(self, number: int) -> int:
        """Return the number of tokens of a sample, at most L + 1."""
        return self._length + 1 if number < self._full else int(self._sizes[number - self._full])

    def piece_count(self, number: int) -> int:
        packed = number - self._full
        return 1 if packed < 0 else int(self._bounds[packed + 1] - self._bounds[packed])

    def place(self, number: int) -> Place:
        firsts, lengths = self.spans(np.array([number]))
        instances = np.repeat(np.arange(len(firsts)), lengths)
        return Place(_ranges(firsts, lengths), instances)

    def spans(self, numbers: Ints) -> tuple[Int64s, Int64s]:
        """Return first token and number of tokens of all runs in these samples; of a single sample in its order."""
        full, packed = numbers[numbers < self._full], numbers[numbers >= self._full] - self._full
        piece = np.searchsorted(self._full_ends, full, side="right")
        before = np.where(piece > 0, self._full_ends[piece - 1], 0) if len(piece) else full
        counts = self._bounds[packed + 1] - self._bounds[packed]
        rest = self._packed[_ranges(self._bounds[packed], counts)]
        labels = self._pieces.lengths[rest].astype(np.int64) - 1
        firsts = (
            self._firsts(piece) + (full - before) * self._length,
            self._firsts(rest) + labels // self._length * self._length,
        )
        lengths = np.full(len(full), self._length + 1), labels % self._length + 1
        return np.concatenate(firsts), np.concatenate(lengths)

    def _firsts(self, pieces: Ints) -> Int64s:
        return self._pieces.firsts[pieces] // self._pieces.unit


def pack(lengths: Ints, sequence_length: int, order: Callable[[], Ints]) -> Arrays:
    """Pack pieces of these lengths [P].

    Args:
        order: returns the order [P] in which they are taken, WINDOW_PIECES at a time.

    Returns:
        full_ends [P], the number of full samples up to the end of each piece, or [0] without a full sample; packed, the
        pieces of the other samples, sample by sample; bounds [S - F + 1], where each sample begins there; sizes
        [S - F] of these samples in tokens.
    """
    full_ends = np.cumsum(np.maximum(lengths.astype(np.int32) - 1, 0) // sequence_length, dtype=np.int64)
    if not len(full_ends) or not full_ends[-1]:
        full_ends = full_ends[:0]
    taken = order()
    packed: list[Ints] = [taken[:0]]
    counts: list[Ints] = [np.zeros(1, dtype=np.int64)]
    sizes: list[Ints] = [np.zeros(0, dtype=np.int32)]
    for begin in range(0, len(taken), WINDOW_PIECES):
        window = taken[begin : begin + WINDOW_PIECES]
        rests = np.maximum(lengths[window].astype(np.int32) - 1, 0) % sequence_length + 1
        window, rests = window[rests > 1], rests[rests > 1]
        if len(window):
            by_size, sample = best_fit_decreasing(rests, sequence_length + 1)
            by_sample = np.argsort(sample, kind="stable")
            packed.append(window[by_size[by_sample]])
            counts.append(np.bincount(sample))
            sizes.append(np.bincount(sample, weights=rests[by_size]).astype(np.int32))
    return {
        "full_ends": full_ends,
        "packed": np.concatenate(packed),
        "bounds": np.cumsum(np.concatenate(counts)),
        "sizes": np.concatenate(sizes),
    }


def best_fit_decreasing(sizes: Ints, capacity: int) -> tuple[Ints, npt.NDArray[np.int32]]:
    """Pack items of these sizes [n], each 1 to `capacity`.

    Returns:
        The items [n] from the largest to the smallest, and the number [n] of each one's bin; bins count from 0.
    """
    by_size = np.argsort(capacity - sizes, kind="stable")
    bin_of: npt.NDArray[np.int32] = np.empty(len(sizes), dtype=np.int32)
    with_room: dict[int, list[int]] = {}  # free room -> bins
    rooms = 0  # bit r: there are bins with room r
    opened = done = 0
    for size, number in reversed(list(enumerate(np.bincount(sizes).tolist()))):
        count = number
        while count:
            # Of equal items, each bin takes as many as go in: after each item it is again the fullest that has room.
            fitting = rooms >> size
            room = size + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            each = room // size
            wanted = -(-count // each)
            if fitting:
                bins = with_room[room][-wanted:]
                del with_room[room][-wanted:]
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                bins = list(range(opened, opened + wanted))
                opened += wanted
            items = min(count, len(bins) * each)
            bin_of[done : done + items] = np.repeat(np.array(bins, dtype=np.int32), each)[:items]
            last = room - (items - (len(bins) - 1) * each) * size  # the last bin may take fewer
            for left, those in ((room - each * size, bins[:-1]), (last, bins[-1:])):
                if left and those:
                    with_room.setdefault(left, []).extend(those)
                    rooms |= 1 << left
            done, count = done + items, count - items
    return by_size, bin_of


class PackedStream:
    """An endless order of samples: each epoch is one permutation of the same packing.

    Args:
        rest: what is left of epoch `epoch - 1` after a change of the length; read first.
    """

    def __init__(
        self, whole: Packing, seed: int, cache: ArrayCache, rest: Packing | None = None, epoch: int = 0
    ) -> None:
        self.whole, self._seed, self._cache, self._rest, self._epoch = whole, seed, cache, rest, epoch
        self._read_first = 0 if rest is None else len(rest)
        self._order_of = lru_cache(maxsize=3)(self._shuffled)

    def place(self, index: int) -> Place:
        packing, number = self.locate(index)
        return packing.place(number)

    def locate(self, index: int) -> tuple[Packing, int]:
        """Return the packing that sample `index` comes from, and its number there."""
        if index < 0:
            raise IndexError(f"sample {index}")
        packing, epoch, place = self._at(index)
        return packing, int(self._order_of(epoch)[place])

    def recut(self, index: int, whole: Packing, sequence_length: int) -> PackedStream:
        """Return the samples of another length that follow on the first `index` of these, whose rest is packed anew.

        Args:
            whole: the packing of a complete epoch, of the new length.
        """
        packing, epoch, place = self._at(index)
        pieces = _joined(*packing.spans(np.asarray(self._order_of(epoch)[place:])))
        facts = (PACKING_VERSION, "rest", _digest(pieces), sequence_length, self._seed, epoch)
        shuffled = lambda: permutation(random_state(self._seed, epoch, _PURPOSE_PIECES), len(pieces.lengths))  # noqa: E731
        arrays = self._cache.get(facts, lambda: pack(pieces.lengths, sequence_length, shuffled))
        rest = Packing(pieces, sequence_length, arrays)
        return PackedStream(whole, self._seed, self._cache, rest, epoch + 1)

    def _at(self, index: int) -> tuple[Packing, int, int]:
        """Return packing, epoch and place in the epoch's order of sample `index`."""
        if self._rest is not None and index < self._read_first:
            return self._rest, self._epoch - 1, index
        epochs, place = divmod(index - self._read_first, len(self.whole))
        return self.whole, self._epoch + epochs, place

    def _shuffled(self, epoch: int) -> Ints:
        if self._rest is not None and epoch < self._epoch:
            return permutation(random_state(self._seed, epoch, _PURPOSE_REST), self._read_first)
        return shuffled_samples(self._cache, len(self.whole), self._seed, epoch)


def pack_documents(
    dataset: IndexedDataset, documents: Range, sequence_length: int, seed: int | None, cache: ArrayCache
) -> Packing:
    """Pack a range of a dataset's documents, taken in the random order of a seed, or without one in that of the file.

    Raises:
        DataError: no document has two tokens.
    """
    where = slice(*documents)
    pieces = Pieces(dataset.sequence_pointers[where], dataset.sequence_lengths[where], dataset.dtype.itemsize)
    count = len(pieces.lengths)

    def order() -> Ints:
        if seed is None:
            return np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
        return permutation(random_state(seed, 0, _PURPOSE_PIECES), count)

    facts = (PACKING_VERSION, "packing", dataset.fingerprint, documents, sequence_length, seed)
    packing = Packing(pieces, sequence_length, cache.get(facts, lambda: pack(pieces.lengths, sequence_length, order)))
    if not len(packing):
        raise DataError(
            f"{dataset.prefix}: documents {documents[0]} to {documents[1]} have at most one token each, and "
            "data.packing=best_fit needs two to learn from; use data.packing=stream"
        )
    return packing


def expected_padding(lengths: Ints, sequence_length: int) -> float:
    """Return the share of padding in packed documents of these lengths, by a million of them at most, evenly spaced."""
    some = lengths[:: -(-max(1, len(lengths)) // WINDOW_PIECES)]
    arrays = pack(some, sequence_length, lambda: np.arange(len(some)))
    return Packing(Pieces(np.zeros(len(some), dtype=np.int64), some), sequence_length, arrays).padding_share


def _joined(firsts: Int64s, lengths: Int64s) -> Pieces:
    """Join runs of which one begins with the token that another ends with; return all in the order of the tokens."""
    order = np.argsort(firsts, kind="stable")
    firsts, ends = firsts[order], (firsts + lengths)[order]
    begins = np.flatnonzero(np.r_[True, firsts[1:] != ends[:-1] - 1][: len(firsts)])
    last = np.r_[begins[1:], len(firsts)] - 1 if len(begins) else begins
    return Pieces(firsts[begins], ends[last] - firsts[begins])


def _ranges(firsts: Ints, counts: Ints) -> Int64s:
    """Return range(first, first + count) of each, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(firsts - (ends - counts), counts) + np.arange(total)


def _digest(pieces: Pieces) -> str:
    return hashlib.sha256(pieces.firsts.tobytes() + pieces.lengths.tobytes()).hexdigest()
