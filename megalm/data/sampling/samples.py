"""Training and validation samples: pure functions of the seed and the sample number, independent of layout.

Legend: L sequence length, T tokens of one epoch, n any number of tokens. A sample reads L + 1 tokens: L inputs
and, shifted by one, L labels; adjacent samples share one token, so that every token is a label.
Samples are cut from the dataset's *sequences*; megalm's datasets have one sequence per document. With best-fit packing
(packing.py) a sample reads at most L + 1 tokens instead, of whole documents where these fit, and is padded.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import check_trained
from megalm.data.indexed.trained_tokens import Bools
from megalm.data.sampling.index_cache import ArrayCache
from megalm.data.sampling.packing import PackedStream, Packing, pack_documents
from megalm.data.sampling.sample_order import (
    DocumentTable,
    Int64s,
    MegatronStream,
    Place,
    PrefixStableStream,
    Range,
    RecutStream,
)
from megalm.errors import ConfigError, DataError

IGNORE_INDEX = -100  # a label that is not a target
Order = Literal["prefix_stable", "megatron"]
PackingKind = Literal["stream", "best_fit"]
Number = TypeVar("Number", bound=np.generic)


class Samples(Protocol):
    """The interface that the loader needs of training and validation samples."""

    sequence_length: int
    document_mask: bool

    def sample(self, index: int) -> tuple[Int64s, Int64s]:
        """Return (tokens [L], labels [L]); labels that are not targets are IGNORE_INDEX."""

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        """Return [L] the document number of each input token, from 0 at the sample's start."""

    def target_count(self, index: int) -> int:
        """Return the sample's number of target labels, without reading tokens."""

    def padding(self, index: int) -> int:
        """Return the number of the sample's positions that hold no token."""
        return 0

    @property
    def dataset_count(self) -> int:
        return 1

    def dataset_of(self, index: int) -> int:
        """Return the number of the dataset that the sample comes from."""
        return 0


def split_documents(number_of_sequences: int, weights: Sequence[float]) -> list[Range]:
    """Split into contiguous ranges [start, end) of sequences, one per weight, with Megatron-LM's rounding.

    Raises:
        ConfigError: weights are negative or sum to zero.
    """
    total = sum(weights)
    if not weights or min(weights) < 0 or total <= 0:
        raise ConfigError(f"data.split: {list(weights)} are not valid weights; give positive numbers such as 95,5")
    bounds, fraction = [0], 0.0
    for weight in weights:
        fraction += weight / total
        bounds.append(round(fraction * number_of_sequences))
    bounds[-1] = number_of_sequences
    return list(pairwise(bounds))


class _Windows(Samples, ABC):
    """Samples as runs of a dataset's tokens; short ones are padded with token 0 and labels IGNORE_INDEX."""

    def __init__(
        self,
        dataset: IndexedDataset,
        document_range: Range,
        sequence_length: int,
        document_mask: bool,
        packing: PackingKind,
    ) -> None:
        self.dataset, self.document_range, self.sequence_length = dataset, document_range, sequence_length
        self.document_mask, self.packing = document_mask, packing
        self.tokens_per_epoch = int(dataset.sequence_lengths[slice(*document_range)].sum(dtype=np.int64))
        if self.tokens_per_epoch < 2:
            raise DataError(
                f"{dataset.prefix}: documents {document_range[0]} to {document_range[1]} have "
                f"{self.tokens_per_epoch} tokens, but a sample needs two; give more text or another data.split"
            )
        check_trained(dataset)
        self.trained_per_epoch = self.tokens_per_epoch
        if dataset.trained is not None:
            first, last = (dataset.sequence_positions(at) for at in (document_range[0], document_range[1] - 1))
            self.trained_per_epoch = dataset.trained.count(first.start, last.stop)
        if not self.trained_per_epoch:
            raise DataError(
                f"{dataset.prefix}: no token of documents {document_range[0]} to {document_range[1]} is trained; "
                "choose another data.split, or check how the dataset was built (inspect_dataset.py --document 0)"
            )

    @abstractmethod
    def place(self, index: int) -> Place:
        """Return the positions of a sample's tokens."""

    def sample(self, index: int) -> tuple[Int64s, Int64s]:
        place = self.place(index)
        tokens = self.dataset.read(place.positions)
        labels = np.where(self._targets(place), tokens[1:], IGNORE_INDEX)
        return self._padded(tokens[:-1], 0), self._padded(labels, IGNORE_INDEX)

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        starts = _starts(self.place(index))
        numbers = np.zeros(len(starts), dtype=np.int32)
        np.cumsum(starts[:-1], out=numbers[1:])
        # Padding counts as a separate document, which no other token attends to.
        return self._padded(numbers, int(numbers[-1]) + 1)

    def target_count(self, index: int) -> int:
        if self.all_are_targets:
            return self._label_count(index)
        if self.document_mask and self.dataset.trained is None and (packed := self._packed(index)) is not None:
            packing, number = packed
            return packing.size(number) - packing.piece_count(number)
        return int(np.count_nonzero(self._targets(self.place(index))))

    @property
    def all_are_targets(self) -> bool:
        """Whether every label is a target, so that their number is known without a sample's place."""
        return not self.document_mask and self.dataset.trained is None and self.packing == "stream"

    def _targets(self, place: Place) -> Bools:
        """Return [n - 1] whether each label is a target."""
        targets = np.ones(len(place.positions) - 1, dtype=np.bool_)
        if self.dataset.trained is not None:
            targets &= self.dataset.trained.at(place.positions[1:])
        if self.document_mask:
            targets &= ~_starts(place)
        elif self.packing == "best_fit":  # the rest of a document begins with a label of the sample before it
            joints = np.flatnonzero(_starts(place))
            targets[joints] &= self.dataset.begins_sequence(place.positions[joints + 1])
        return targets

    def _label_count(self, index: int) -> int:
        """Return how many of the sample's positions hold a token."""
        packed = self._packed(index)
        return self.sequence_length if packed is None else packed[0].size(packed[1]) - 1

    def padding(self, index: int) -> int:
        return self.sequence_length - self._label_count(index)

    def _packed(self, index: int) -> tuple[Packing, int] | None:
        """Return the packing that a sample comes from, and its number there; None for a window of a stream."""
        return None

    def _padded(self, row: npt.NDArray[Number], value: int) -> npt.NDArray[Number]:
        missing = self.sequence_length - len(row)
        return np.pad(row, (0, missing), constant_values=value) if missing else row


class TrainingSamples(_Windows):
    """Samples of a range of sequences in random order, in any number.

    prefix_stable: an endless token stream with each epoch's documents shuffled; sample k of the stream covers its
    tokens [kL, kL + L], and the samples that start in the same epoch are shuffled. Nothing is dropped, every token is
    a label once per epoch, and the first samples never depend on the number requested. All randomness depends on
    (seed, epoch) only and comes from RandomState, whose values NumPy keeps stable.

    megatron: Megatron-LM's order for `requested_samples`; it changes with that number.

    packing="best_fit": the samples of one packing, shuffled anew each epoch. It depends on the seed only, so the first
    samples never depend on the number requested. Every token but the first of a document is a label once per epoch.

    Args:
        stride: tokens from the start of one sample to that of the next; default L. Less makes samples overlap, and
            every token is then seen L / stride times per epoch (see `stride_warning`).
        cache: stores the shuffled orders, which take seconds to make for large datasets.

    Raises:
        DataError: the range has too few tokens for one sample.
        ConfigError: megatron without `requested_samples`, or with a stride; best-fit packing with one of these.
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
        stride: int | None = None,
        cache: Path | None = None,
        packing: PackingKind = "stream",
    ) -> None:
        super().__init__(dataset, document_range, sequence_length, document_mask, packing)
        self.stride = sequence_length if stride is None else stride
        if not 0 < self.stride <= sequence_length or (order == "megatron" and self.stride != sequence_length):
            raise ConfigError(
                f"data.stride={stride}: choose 1 to data.sequence_length={sequence_length}; "
                "data.order=megatron allows only data.sequence_length"
            )
        self._seed, self._cache = seed, cache
        self._stream: PrefixStableStream | RecutStream | MegatronStream | PackedStream
        if packing == "best_fit":
            if order == "megatron" or self.stride != sequence_length:
                raise ConfigError(
                    "data.packing=best_fit cuts no document that fits a sample: it has no data.stride and no "
                    "data.order=megatron"
                )
            whole = pack_documents(dataset, document_range, sequence_length, seed, ArrayCache(cache))
            self._stream = PackedStream(whole, seed, ArrayCache(cache))
        elif order == "megatron":
            if requested_samples is None:
                raise ConfigError("data.order=megatron: its order depends on the number of samples, which is missing")
            self._stream = MegatronStream(
                dataset, document_range, sequence_length, seed, requested_samples, self.tokens_per_epoch
            )
        else:
            self._stream = PrefixStableStream(
                dataset, document_range, sequence_length, self.stride, seed, self.tokens_per_epoch, ArrayCache(cache)
            )
        dataset.expect_random_reads()
        requested = requested_samples if order == "megatron" else None
        facts = [dataset.fingerprint, document_range, sequence_length, seed, order, requested]
        facts += [] if stride in (None, sequence_length) else [stride]
        facts += [] if packing == "stream" else [packing]
        self.fingerprint = hash_of(*facts, "v1")

    def recut(self, consumed: int, sequence_length: int) -> TrainingSamples:
        """Return samples of another length that continue after `consumed` of these, with the rest of the epoch.

        Raises:
            ConfigError: the rest of this order, or of this stride, cannot be recut.
        """
        if isinstance(self._stream, MegatronStream) or self.stride != self.sequence_length:
            raise ConfigError(
                f"data.sequence_length cannot become {sequence_length} in the middle of data.order=megatron or of "
                f"samples that overlap; keep {self.sequence_length}, or start again with resume.allow=[order]"
            )
        after = TrainingSamples(
            self.dataset,
            self.document_range,
            sequence_length,
            self._seed,
            document_mask=self.document_mask,
            cache=self._cache,
            packing=self.packing,
        )
        if isinstance(self._stream, PackedStream):
            assert isinstance(after._stream, PackedStream)
            after._stream = self._stream.recut(consumed, after._stream.whole, sequence_length)
        else:
            assert isinstance(after._stream, PrefixStableStream)
            rest = self._stream.rest_of_epoch(consumed)
            after._stream = RecutStream(after._stream, rest, sequence_length, self._seed)
        after.fingerprint = hash_of(self.fingerprint, "recut", consumed, sequence_length)
        return after

    @property
    def recut_tokens(self) -> tuple[int, int]:
        """Number of tokens that recutting skips, and that it reads twice."""
        stream = self._stream
        return (stream.skipped_tokens, stream.repeated_tokens) if isinstance(stream, RecutStream) else (0, 0)

    @property
    def samples_per_epoch(self) -> float:
        return self.tokens_per_epoch / self.stride if self.whole is None else len(self.whole)

    @property
    def padding_share(self) -> float:
        """The part of the positions of an epoch's samples that holds no token, 0 to 1."""
        return 0.0 if self.whole is None else self.whole.padding_share

    @property
    def whole(self) -> Packing | None:
        """The packing of an epoch."""
        return self._stream.whole if isinstance(self._stream, PackedStream) else None

    def place(self, index: int) -> Place:
        return self._stream.place(index)

    def _packed(self, index: int) -> tuple[Packing, int] | None:
        return self._stream.locate(index) if isinstance(self._stream, PackedStream) else None


class ValidationSamples(_Windows):
    """Fixed consecutive windows over a range of sequences, in file order; the last one is padded.

    Every token but the first is a target once (except, with `document_mask`, the first of each document). With best-fit
    packing the samples of one packing instead.

    Raises:
        DataError: the range has fewer than two tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        document_range: Range,
        sequence_length: int,
        document_mask: bool = False,
        packing: PackingKind = "stream",
        cache: Path | None = None,
    ) -> None:
        super().__init__(dataset, document_range, sequence_length, document_mask, packing)
        self._table = DocumentTable(dataset, np.arange(*document_range))
        self._packing: Packing | None = None
        if packing == "best_fit":
            self._packing = pack_documents(dataset, document_range, sequence_length, None, ArrayCache(cache))
            count = len(self._packing)
        else:
            count = -(-(self.tokens_per_epoch - 1) // sequence_length)
        self._choose(np.arange(count))

    def _choose(self, windows: Int64s) -> None:
        self._windows = windows
        facts = [self.dataset.fingerprint, self.document_range, self.sequence_length, windows.tolist()]
        self.fingerprint = hash_of(*facts, *([] if self.packing == "stream" else [self.packing]), "v1")

    def __len__(self) -> int:
        return len(self._windows)

    def subset(self, count: int) -> ValidationSamples:
        """Return `count` evenly spaced windows, always the same ones; all windows if there are no more."""
        if count >= len(self):
            return self
        part = copy.copy(self)
        part._choose(self._windows[evenly(len(self), count)])
        if self.dataset.trained is not None and not any(map(part.target_count, range(count))):
            raise DataError(
                f"{self.dataset.prefix}: no token of the {count} samples that evaluate.max_samples chooses is trained; "
                "raise it"
            )
        return part

    def place(self, index: int) -> Place:
        if self._packing is not None:
            return self._packing.place(int(self._windows[index]))
        return Place(*self._table.locate(self._first(index), self._label_count(index) + 1))

    def _packed(self, index: int) -> tuple[Packing, int] | None:
        return None if self._packing is None else (self._packing, int(self._windows[index]))

    def _label_count(self, index: int) -> int:
        if self._packing is not None:
            return super()._label_count(index)
        return min(self.sequence_length, self.tokens_per_epoch - 1 - self._first(index))

    def _first(self, index: int) -> int:
        return int(self._windows[index]) * self.sequence_length


def _starts(place: Place) -> npt.NDArray[np.bool_]:
    """Return [n - 1] whether the label is the first token of a new document."""
    return place.instances[1:] != place.instances[:-1]


def evenly(count: int, limit: int | None) -> list[int]:
    """Up to `limit` of `count` indices, evenly spaced and always the same."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * index + 1) * count // (2 * limit) for index in range(limit)]


def hash_of(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()
