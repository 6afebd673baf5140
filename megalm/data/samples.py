"""Which tokens each sample holds: pure functions of the seed and the sample's number, independent of layout.

Legend: L sequence length, T tokens of one epoch, n any number of tokens. A sample reads L + 1 tokens: L inputs
and, shifted by one, L labels; neighbouring samples share that one token, so that every token is a label.
What the samples cut into pieces here is a *sequence* of the dataset; datasets of megalm have one per document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megalm.data import megatron_order
from megalm.data.document_table import DocumentTable
from megalm.data.indexed import IndexedDataset
from megalm.errors import ConfigError, DataError

IGNORE = -100  # a label that is no target
Order = Literal["prefix_stable", "megatron"]
Range = tuple[int, int]
Int64s = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where the tokens of a sample lie, [L + 1] each."""

    positions: Int64s  # in the dataset's tokens
    instances: Int64s  # counts documents along the stream: changes where another one starts


class Samples(Protocol):
    """What the loader needs of training and validation samples alike."""

    sequence_length: int
    document_mask: bool

    def sample(self, index: int) -> tuple[Int64s, Int64s]:
        """(tokens [L], labels [L]); labels that are no targets are IGNORE."""

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        """[L] number of the document that each input token is of, from 0 at the sample's start."""

    def target_count(self, index: int) -> int:
        """How many labels of the sample are targets, without reading tokens."""


def split_documents(number_of_sequences: int, weights: Sequence[float]) -> list[Range]:
    """Contiguous ranges [start, end) of sequences, one for each weight, with Megatron-LM's rounding.

    Raises:
        ConfigError: weights that are negative or add up to nothing.
    """
    total = sum(weights)
    if not weights or min(weights) < 0 or total <= 0:
        raise ConfigError(f"data.split: {list(weights)} are not weights; state positive numbers such as 95,5")
    bounds, fraction = [0], 0.0
    for weight in weights:
        fraction += weight / total
        bounds.append(round(fraction * number_of_sequences))
    bounds[-1] = number_of_sequences
    return list(pairwise(bounds))


class TrainingSamples:
    """Samples of a range of sequences, in random order, as many as anyone asks for.

    prefix_stable: an endless stream of tokens, every epoch's documents in an order of its own; sample k of the
    stream covers its tokens [kL, kL + L], and the samples that start in one epoch are shuffled among
    themselves. Nothing is dropped, every token is a label once an epoch, and the first samples never depend on
    how many are asked for. All randomness is of (seed, epoch) only, from RandomState, whose values NumPy keeps.

    megatron: the order that Megatron-LM gives for `requested_samples`; it changes with that number.

    Raises:
        DataError: a range without tokens enough for one sample.
        ConfigError: megatron without `requested_samples`.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        document_range: Range,
        sequence_length: int,
        seed: int,
        order: Order = "prefix_stable",
        requested_samples: int | None = None,
        document_mask: bool = False,
    ) -> None:
        self.dataset, self.document_range, self.sequence_length = dataset, document_range, sequence_length
        self.document_mask = document_mask
        self.tokens_per_epoch = _count_tokens(dataset, document_range)
        if self.tokens_per_epoch < 2:
            raise DataError(
                f"{dataset.prefix}: documents {document_range[0]} to {document_range[1]} hold "
                f"{self.tokens_per_epoch} tokens, a sample needs two; give more text or another data.split"
            )
        self._stream: _PrefixStableStream | _MegatronStream
        if order == "megatron":
            if requested_samples is None:
                raise ConfigError("data.order=megatron: its order depends on the number of samples; state it")
            self._stream = _MegatronStream(
                dataset, document_range, sequence_length, seed, requested_samples, self.tokens_per_epoch
            )
        else:
            self._stream = _PrefixStableStream(dataset, document_range, sequence_length, seed, self.tokens_per_epoch)
        requested = requested_samples if order == "megatron" else None
        self.fingerprint = _hash(dataset.fingerprint, document_range, sequence_length, seed, order, requested, "v1")

    @property
    def samples_per_epoch(self) -> float:
        return self.tokens_per_epoch / self.sequence_length

    def epoch_of(self, index: int) -> int:
        """How many whole epochs the samples before `index` have used up."""
        return index * self.sequence_length // self.tokens_per_epoch

    def sample(self, index: int) -> tuple[Int64s, Int64s]:
        place = self._stream.place(index)
        tokens = self.dataset.tokens[place.positions].astype(np.int64)
        labels = tokens[1:].copy()
        if self.document_mask:
            labels[_starts(place)] = IGNORE
        return tokens[:-1], labels

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        return _number_documents(self._stream.place(index))[:-1]

    def target_count(self, index: int) -> int:
        if not self.document_mask:
            return self.sequence_length
        return self.sequence_length - int(np.count_nonzero(_starts(self._stream.place(index))))


class ValidationSamples:
    """Fixed consecutive windows over a range of sequences, in the file's order; the last one is padded.

    Padding is token 0 with labels IGNORE. Every token but the first is a target once (less, with
    `document_mask`, the first of each document).

    Raises:
        DataError: a range with fewer than two tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        document_range: Range,
        sequence_length: int,
        document_mask: bool = False,
        windows: Int64s | None = None,
    ) -> None:
        self.dataset, self.document_range, self.sequence_length = dataset, document_range, sequence_length
        self.document_mask = document_mask
        self._table = DocumentTable(dataset, np.arange(*document_range))
        if self._table.token_count < 2:
            raise DataError(
                f"{dataset.prefix}: documents {document_range[0]} to {document_range[1]} hold "
                f"{self._table.token_count} tokens, validation needs two; give more text or another data.split"
            )
        count = -(-(self._table.token_count - 1) // sequence_length)
        self._windows = np.arange(count) if windows is None else windows
        self.fingerprint = _hash(dataset.fingerprint, document_range, sequence_length, self._windows.tolist(), "v1")

    def __len__(self) -> int:
        return len(self._windows)

    def subset(self, count: int) -> ValidationSamples:
        """`count` of these windows, evenly spaced, always the same; all where there are no more."""
        if count >= len(self):
            return self
        chosen = (2 * np.arange(count) + 1) * len(self) // (2 * count)
        return ValidationSamples(
            self.dataset, self.document_range, self.sequence_length, self.document_mask, self._windows[chosen]
        )

    def sample(self, index: int) -> tuple[Int64s, Int64s]:
        place = self._place(index)
        targets = len(place.positions) - 1
        tokens = np.zeros(self.sequence_length, dtype=np.int64)
        labels = np.full(self.sequence_length, IGNORE, dtype=np.int64)
        read = self.dataset.tokens[place.positions].astype(np.int64)
        tokens[:targets], labels[:targets] = read[:-1], read[1:]
        if self.document_mask:
            labels[:targets][_starts(place)] = IGNORE
        return tokens, labels

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        numbers = _number_documents(self._place(index))[:-1]
        # Padding counts as a document of its own, which nothing attends to.
        padded = np.full(self.sequence_length, int(numbers[-1]) + 1, dtype=np.int32)
        padded[: len(numbers)] = numbers
        return padded

    def target_count(self, index: int) -> int:
        place = self._place(index)
        masked = int(np.count_nonzero(_starts(place))) if self.document_mask else 0
        return len(place.positions) - 1 - masked

    def _place(self, index: int) -> Place:
        first = int(self._windows[index]) * self.sequence_length
        count = min(self.sequence_length + 1, self._table.token_count - first)
        return Place(*self._table.locate(first, count))


class _PrefixStableStream:
    def __init__(
        self, dataset: IndexedDataset, document_range: Range, sequence_length: int, seed: int, tokens_per_epoch: int
    ) -> None:
        self._dataset, self._range = dataset, document_range
        self._length, self._seed, self._epoch_tokens = sequence_length, seed, tokens_per_epoch
        # A sample reads over the end of its epoch, and a resume starts in the middle of one: three is enough.
        self._documents_of = lru_cache(maxsize=3)(self._shuffled_documents)
        self._shuffle_of = lru_cache(maxsize=3)(self._shuffled_samples)

    def place(self, index: int) -> Place:
        if index < 0:
            raise IndexError(f"sample {index}")
        epoch = index * self._length // self._epoch_tokens
        first = self._first_sample(epoch)
        position = (first + int(self._shuffle_of(epoch)[index - first])) * self._length
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
        return -(-epoch * self._epoch_tokens // self._length)

    def _shuffled_documents(self, epoch: int) -> DocumentTable:
        order = _random_state(self._seed, epoch, 0).permutation(self._range[1] - self._range[0])
        return DocumentTable(self._dataset, order + self._range[0])

    def _shuffled_samples(self, epoch: int) -> npt.NDArray[np.integer]:
        count = self._first_sample(epoch + 1) - self._first_sample(epoch)
        order = _random_state(self._seed, epoch, 1).permutation(count)
        return order.astype(np.int32) if count < 2**31 else order


class _MegatronStream:
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


def _random_state(seed: int, epoch: int, purpose: int) -> np.random.RandomState:
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch, purpose]
    return np.random.RandomState(np.array(words, dtype=np.uint32))


def _count_tokens(dataset: IndexedDataset, document_range: Range) -> int:
    return int(dataset.sequence_lengths[slice(*document_range)].sum(dtype=np.int64))


def _starts(place: Place) -> npt.NDArray[np.bool_]:
    """[n - 1] where the label is the first token of another document than the input's."""
    return place.instances[1:] != place.instances[:-1]


def _number_documents(place: Place) -> npt.NDArray[np.int32]:
    numbers = np.zeros(len(place.instances), dtype=np.int32)
    np.cumsum(_starts(place), out=numbers[1:])
    return numbers


def _hash(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
