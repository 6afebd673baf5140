"""Orders of samples as streams of tokens: which tokens sample k reads. Pure functions of the seed.

Legend: L sequence length, T tokens of one epoch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalm.data import megatron_order
from megalm.data.array_cache import ArrayCache, Arrays
from megalm.data.document_table import DocumentTable, document_starts
from megalm.data.indexed import IndexedDataset
from megalm.errors import DataError

ORDER_VERSION = 1
Range = tuple[int, int]
Int64s = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where the tokens of a sample lie, [L + 1] each."""

    positions: Int64s  # in the dataset's tokens
    instances: Int64s  # counts documents along the stream: changes where another one starts


def whole_windows(tokens: int, sequence_length: int, stride: int) -> int:
    """How many samples of L + 1 tokens fit into one pass over `tokens`, each starting `stride` after the one before."""
    return max(0, (tokens - sequence_length - 1) // stride + 1)


def stride_warning(tokens: int, sequence_length: int, stride: int, samples: int) -> str | None:
    """What people must know before they train on overlapping samples; None where they do not overlap."""
    if stride >= sequence_length:
        return None
    overlapping, apart = (whole_windows(tokens, sequence_length, step) for step in (stride, sequence_length))
    return (
        f"data.stride={stride} is less than data.sequence_length={sequence_length}: each of the {tokens:,} tokens is "
        f"seen {sequence_length / stride:,.1f} times an epoch ({overlapping:,} samples, {apart:,} if they did not "
        f"overlap), and about {samples * sequence_length / tokens:,.1f} times in this run"
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
        # A sample reads over the end of its epoch, and a resume starts in the middle of one: three is enough.
        self._documents_of = lru_cache(maxsize=3)(self._shuffled_documents)
        self._shuffle_of = lru_cache(maxsize=3)(self._shuffled_samples)

    def place(self, index: int) -> Place:
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch = index * self._stride // self._epoch_tokens
        first = self._first_sample(epoch)
        position = (first + int(self._shuffle_of(epoch)[index - first])) * self._stride
        positions, instances = [], []
        wanted = self._length + 1
        while wanted:  # once, or more often where the sample reads on into the next epochs
            epoch, offset = divmod(position, self._epoch_tokens)
            count = min(wanted, self._epoch_tokens - offset)
            where, document = self._documents_of(epoch).locate(offset, count)
            positions.append(where)
            instances.append(document + epoch * (self._range[1] - self._range[0]))
            position, wanted = position + count, wanted - count
        return Place(np.concatenate(positions), np.concatenate(instances))

    def _first_sample(self, epoch: int) -> int:
        """The first sample that starts in `epoch` or later."""
        return -(-epoch * self._epoch_tokens // self._stride)

    def _shuffled_documents(self, epoch: int) -> DocumentTable:
        def make() -> Arrays:
            order = _permutation(_random_state(self._seed, epoch, 0), self._range[1] - self._range[0])
            order = (order + self._range[0]).astype(order.dtype)
            return {"documents": order, "starts": document_starts(self._dataset, order)}

        facts = (ORDER_VERSION, "documents", self._dataset.fingerprint, self._range, self._seed, epoch)
        arrays = self._cache.get(facts, make)
        return DocumentTable(self._dataset, arrays["documents"], arrays["starts"])

    def _shuffled_samples(self, epoch: int) -> npt.NDArray[np.integer]:
        count = self._first_sample(epoch + 1) - self._first_sample(epoch)
        facts = (ORDER_VERSION, "samples", count, self._seed, epoch)
        state = _random_state(self._seed, epoch, 1)
        return self._cache.get(facts, lambda: {"samples": _permutation(state, count)})["samples"]


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
        documents, self._shuffle = megatron_order.build(
            np.arange(*document_range, dtype=np.int32), tokens_per_epoch, sequence_length, requested_samples, seed
        )
        self._table = DocumentTable(dataset, documents)
        self._length = sequence_length

    def place(self, index: int) -> Place:
        if not 0 <= index < len(self._shuffle):
            raise DataError(
                f"data.order=megatron: sample {index} of {len(self._shuffle)}; this order is made for a stated "
                "number of samples, ask for more or use data.order=prefix_stable"
            )
        return Place(*self._table.locate(int(self._shuffle[index]) * self._length, self._length + 1))


def _permutation(state: np.random.RandomState, count: int) -> npt.NDArray[np.integer]:
    """[count] what `state.permutation(count)` gives, in half its memory."""
    order: npt.NDArray[np.integer] = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    state.shuffle(order)
    return order


def _random_state(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch, purpose]
    return np.random.RandomState(np.array(words, dtype=np.uint32))
