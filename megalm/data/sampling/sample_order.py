"""Sample orders: which tokens sample k reads. Pure functions of the seed.

The orders are Megatron-LM's, the prefix-stable one, and the recut rest of an epoch.
Legend: L sequence length, T tokens of one epoch, E epochs, D documents in a list, n requested tokens.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.index_cache import ArrayCache, Arrays
from megalm.errors import DataError


class DocumentTable:
    """Maps stream positions to the dataset's tokens with one binary search for all tokens.

    Args:
        documents: [D] sequences of the dataset, in reading order; a sequence can occur several times.
        starts: [D + 1] result of `document_starts` for them, if already computed.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: npt.NDArray[np.integer],
        starts: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._dataset, self.documents = dataset, documents
        if len(dataset) < 2**31 and documents.dtype != np.int32:
            self.documents = documents.astype(np.int32)
        # Stream position of each document's first token, and of the end: [D + 1].
        self.starts = document_starts(dataset, documents) if starts is None else starts

    def find(self, position: npt.NDArray[np.int64] | int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Return (index in `documents`, token inside that document) of stream positions; skips empty documents."""
        entry = np.asarray(np.searchsorted(self.starts, position, side="right") - 1)
        return entry, np.asarray(position - self.starts[entry])

    def locate(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Map stream positions [first, first + count) to places in the dataset's tokens [n] and in `documents` [n]."""
        assert 0 <= first <= first + count <= self.starts[-1]
        entry, offset = self.find(np.arange(first, first + count, dtype=np.int64))
        base = self._dataset.sequence_pointers[self.documents[entry]] // self._dataset.dtype.itemsize
        return base + offset, entry.astype(np.int64)


def document_starts(dataset: IndexedDataset, documents: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return [D + 1] the stream position of each document's first token, and of the end."""
    starts = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum(dataset.sequence_lengths[documents], dtype=np.int64, out=starts[1:])
    return starts


# Megatron-LM's order
#
# Exactly the order of documents and samples of its GPTDataset, for continuing Megatron-LM runs. It depends on the
# number of requested samples, so a longer run sees other samples from the start.

# If less than this share of the last epoch is needed, that epoch is shuffled separately.
SEPARATE_BELOW = 0.80


def count_samples(epochs: int, tokens_per_epoch: int, sequence_length: int) -> int:
    """Return the number of full samples in `epochs` epochs; the stream's last token can only be a label."""
    return (epochs * tokens_per_epoch - 1) // sequence_length


def count_epochs(requested: int, tokens_per_epoch: int, sequence_length: int) -> int:
    """Return the smallest number of epochs that give `requested` samples."""
    return max(1, -(-(requested * sequence_length + 1) // tokens_per_epoch))


def build(
    documents: npt.NDArray[np.int32], tokens_per_epoch: int, sequence_length: int, requested: int, seed: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return (document index [E x documents], shuffle index [samples]); sample i is number shuffle[i] of the stream."""
    epochs = count_epochs(requested, tokens_per_epoch, sequence_length)
    total = count_samples(epochs, tokens_per_epoch, sequence_length)
    before_last = count_samples(epochs - 1, tokens_per_epoch, sequence_length) if epochs > 1 else 0
    per_epoch = count_samples(1, tokens_per_epoch, sequence_length)
    separate = epochs > 1 and requested - before_last < int(SEPARATE_BELOW * per_epoch)
    random = np.random.RandomState(seed)  # one state for all shuffles, in this order
    parts = [epochs - 1, 1] if separate else [epochs]
    index = []
    for part in parts:
        tiled = np.tile(documents, part)
        random.shuffle(tiled)
        index.append(tiled)
    bounds = [0, before_last, total] if separate else [0, total]
    shuffle = np.arange(total, dtype=np.int64)
    for start, end in pairwise(bounds):
        random.shuffle(shuffle[start:end])
    return np.concatenate(index), shuffle


ORDER_VERSION = 1
Range = tuple[int, int]
Int64s = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Positions of a sample's tokens, [L + 1] each."""

    positions: Int64s  # in the dataset's tokens
    instances: Int64s  # document counter along the stream: changes where a document starts


class Rest(NamedTuple):
    """The unread rest of an epoch.

    Attributes:
        starts: [n] start tokens in the stream of the unread samples, ascending.
        length: labels per sample.
        end: token at which the epoch's last sample ends.
    """

    starts: Int64s
    length: int
    epoch: int
    end: int


def whole_windows(tokens: int, sequence_length: int, stride: int) -> int:
    """Return how many samples of L + 1 tokens, starting `stride` apart, fit into one pass over `tokens`."""
    return max(0, (tokens - sequence_length - 1) // stride + 1)


def stride_warning(tokens: int, sequence_length: int, stride: int, samples: int) -> str | None:
    """Return a warning about training on overlapping samples; None if they do not overlap."""
    if stride >= sequence_length:
        return None
    overlapping, apart = (whole_windows(tokens, sequence_length, step) for step in (stride, sequence_length))
    seen, in_run = (count * sequence_length / tokens for count in (overlapping, samples))
    return (
        f"data.stride={stride} is less than data.sequence_length={sequence_length}: each of the {tokens:,} tokens is "
        f"seen {seen:,.1f} times per epoch ({overlapping:,} samples, {apart:,} if they did not overlap), and about "
        f"{in_run:,.1f} times in this run"
    )


class PrefixStableStream:
    """Sample k covers tokens [k * stride, k * stride + L] of the endless stream."""

    def __init__(
        self,
        dataset: IndexedDataset,
        document_range: Range,
        sequence_length: int,
        stride: int,
        seed: int,
        tokens_per_epoch: int,
        cache: ArrayCache,
    ) -> None:
        self._dataset, self._range, self._cache = dataset, document_range, cache
        self._length, self._stride, self._seed, self._epoch_tokens = sequence_length, stride, seed, tokens_per_epoch
        # A sample can read past the end of its epoch, and a resume starts inside one: three is enough.
        self._documents_of = lru_cache(maxsize=3)(self._shuffled_documents)
        self._shuffle_of = lru_cache(maxsize=3)(self._shuffled_samples)

    def place(self, index: int) -> Place:
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch = self.epoch_of(index)
        first = self.first_sample(epoch)
        return self.place_at((first + int(self._shuffle_of(epoch)[index - first])) * self._stride)

    def place_at(self, position: int) -> Place:
        """Return the sample that starts at token `position` of the stream."""
        positions, instances = [], []
        wanted = self._length + 1
        while wanted:  # more than once if the sample continues into the next epochs
            epoch, offset = divmod(position, self._epoch_tokens)
            count = min(wanted, self._epoch_tokens - offset)
            where, document = self._documents_of(epoch).locate(offset, count)
            positions.append(where)
            instances.append(document + epoch * (self._range[1] - self._range[0]))
            position, wanted = position + count, wanted - count
        return Place(np.concatenate(positions), np.concatenate(instances))

    def epoch_of(self, index: int) -> int:
        """Return the epoch in which sample `index` starts."""
        return index * self._stride // self._epoch_tokens

    def rest_of_epoch(self, index: int) -> Rest:
        """Return the rest of sample `index`'s epoch that the samples before it leave unread."""
        epoch = self.epoch_of(index)
        first, end = self.first_sample(epoch), self.first_sample(epoch + 1)
        left = (first + self._shuffle_of(epoch)[index - first :].astype(np.int64)) * self._stride
        return Rest(np.sort(left), self._length, epoch, end * self._stride)

    def first_sample(self, epoch: int) -> int:
        """Return the first sample that starts in `epoch` or later."""
        return -(-epoch * self._epoch_tokens // self._stride)

    def _shuffled_documents(self, epoch: int) -> DocumentTable:
        def make() -> Arrays:
            order = permutation(random_state(self._seed, epoch, 0), self._range[1] - self._range[0])
            order = (order + self._range[0]).astype(order.dtype)
            return {"documents": order, "starts": document_starts(self._dataset, order)}

        facts = (ORDER_VERSION, "documents", self._dataset.fingerprint, self._range, self._seed, epoch)
        arrays = self._cache.get(facts, make)
        return DocumentTable(self._dataset, arrays["documents"], arrays["starts"])

    def _shuffled_samples(self, epoch: int) -> npt.NDArray[np.integer]:
        count = self.first_sample(epoch + 1) - self.first_sample(epoch)
        return shuffled_samples(self._cache, count, self._seed, epoch)


class RecutStream:
    """The rest of an epoch cut into shuffled samples of another length, followed by the complete epochs after it.

    No token is read again in that epoch. Unread tokens between read samples that are too few for a full sample are
    skipped.

    Args:
        whole: the stream with the new length and the same stride.
        length: the new length, L.

    Attributes:
        skipped_tokens: tokens that the new cut skips.
        repeated_tokens: tokens that it reads twice, at the boundary to the next epoch.
    """

    def __init__(self, whole: PrefixStableStream, rest: Rest, length: int, seed: int) -> None:
        self._whole, self._length, self._epoch = whole, length, rest.epoch
        self._first_after = whole.first_sample(rest.epoch + 1)
        begins, ends = _intervals(rest.starts, rest.length)
        counts = (ends - begins) // length
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + inside * length
        self._starts: Int64s = starts[permutation(random_state(seed, rest.epoch, 2), len(starts))]
        self._end = self._first_after * length
        self.skipped_tokens = int((ends - begins - counts * length).sum()) + max(0, self._end - rest.end)
        self.repeated_tokens = max(0, rest.end - self._end)

    def place(self, index: int) -> Place:
        if index < len(self._starts):
            return self._whole.place_at(int(self._starts[index]))
        return self._whole.place(self._first_after + index - len(self._starts))

    def rest_of_epoch(self, index: int) -> Rest:
        if index < len(self._starts):
            return Rest(np.sort(self._starts[index:]), self._length, self._epoch, self._end)
        return self._whole.rest_of_epoch(self._first_after + index - len(self._starts))


def _intervals(starts: Int64s, length: int) -> tuple[Int64s, Int64s]:
    """Merge adjacent windows of `length` into intervals; return their starts and ends."""
    if not len(starts):
        return starts, starts
    breaks = np.flatnonzero(np.diff(starts) != length) + 1
    return starts[np.r_[0, breaks]], starts[np.r_[breaks - 1, -1]] + length


class MegatronStream:
    def __init__(
        self,
        dataset: IndexedDataset,
        document_range: Range,
        sequence_length: int,
        seed: int,
        requested_samples: int,
        tokens_per_epoch: int,
    ) -> None:
        documents, self._shuffle = build(
            np.arange(*document_range, dtype=np.int32), tokens_per_epoch, sequence_length, requested_samples, seed
        )
        self._table = DocumentTable(dataset, documents)
        self._length = sequence_length

    def place(self, index: int) -> Place:
        if not 0 <= index < len(self._shuffle):
            raise DataError(
                f"data.order=megatron: sample {index} of {len(self._shuffle)}; this order has a fixed "
                "number of samples; request more or use data.order=prefix_stable"
            )
        return Place(*self._table.locate(int(self._shuffle[index]) * self._length, self._length + 1))


def permutation(state: np.random.RandomState, count: int) -> npt.NDArray[np.integer]:
    """Return [count] the result of `state.permutation(count)`, in half the memory."""
    order: npt.NDArray[np.integer] = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    state.shuffle(order)
    return order


def shuffled_samples(cache: ArrayCache, count: int, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """Return [count] the order of an epoch's samples."""
    facts = (ORDER_VERSION, "samples", count, seed, epoch)
    state = random_state(seed, epoch, 1)
    return cache.get(facts, lambda: {"samples": permutation(state, count)})["samples"]


def random_state(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch, purpose]
    return np.random.RandomState(np.array(words, dtype=np.uint32))
