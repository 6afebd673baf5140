"""Load the batches of this data-parallel rank, for training and validation, as NumPy arrays.

Legend: B samples in a global batch, b in a micro-batch, T sequence length. Micro-batch m of rank d, of n ranks,
takes sequences (m * n + d) * b + [0, b) of the global batch: every layout sees the same B sequences. A sequence is a
sample, or one of the equal parts that a sample is cut into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megalm.data.sampling.samples import IGNORE_INDEX, Samples, ValidationSamples
from megalm.errors import ConfigError

PREFETCHED_BATCHES = 2


@dataclass(frozen=True)
class MicroBatch:
    """tokens, labels: int64 [b, T], IGNORE_INDEX where a label is not a target; documents: int32 [b, T], if masked.

    datasets: int64 [b], the number of each sample's dataset in a mixture of several.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32] | None
    datasets: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's part of a global batch.

    Attributes:
        target_count: number of target labels in the complete global batch, over all ranks, known before any forward
            pass.
        sample_range: [first, end) of the samples in the complete global batch.
        padding: number of positions that hold no token, in these samples.
        dataset_targets: number of targets by dataset, likewise of the complete global batch; () without a mixture.
    """

    micro_batches: tuple[MicroBatch, ...]
    target_count: int
    sample_range: tuple[int, int]
    padding: int = 0
    dataset_targets: tuple[int, ...] = ()

    @property
    def divisor(self) -> int:
        """What the sum of losses is divided by; a batch without targets has the loss 0, and no gradient."""
        return max(1, self.target_count)


# What else a batch needs before it is used, such as page-locked memory.
PrepareBatch = Callable[[GlobalBatch], GlobalBatch]


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is split into the ranks' micro-batches; a batch of another size has more or less of them.

    Raises:
        ConfigError: micro-batch times ranks does not divide the global batch.
    """

    global_batch_size: int
    micro_batch_size: int
    data_rank: int
    data_size: int

    def __post_init__(self) -> None:
        step = self.micro_batch_size * self.data_size
        if self.global_batch_size < 1 or step < 1 or self.global_batch_size % step:
            raise ConfigError(
                f"train_batch_size {self.global_batch_size} is not a multiple of micro-batch {self.micro_batch_size} "
                f"x {self.data_size} data-parallel ranks = {step}; change one of the three"
            )
        assert 0 <= self.data_rank < self.data_size, (self.data_rank, self.data_size)

    @property
    def micro_batches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def offsets(self, micro_batch: int) -> range:
        """Return the positions in the global batch of this rank's micro-batch."""
        first = (micro_batch * self.data_size + self.data_rank) * self.micro_batch_size
        return range(first, first + self.micro_batch_size)


class BatchLoader:
    """Loads training batches by the number of their first sample; a thread prefetches the next ones.

    Close it at the end, or use it as a context manager.

    Args:
        prepare: called in that thread with each batch.
    """

    def __init__(self, samples: Samples, layout: BatchLayout, prepare: PrepareBatch | None = None) -> None:
        self._samples, self._layout, self._prepare = samples, layout, prepare
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._pending: dict[tuple[int, int, int], Future[GlobalBatch]] = {}  # first and last sample, parts

    def batch(self, first_sample: int, sizes: Sequence[tuple[int, int]] = ()) -> GlobalBatch:
        """Return this rank's part of the global batch that begins with sample `first_sample`.

        Args:
            sizes: of this batch and of the next ones, the number of samples and the parts that each is cut into; () for
                the layout's B, uncut.

        Raises:
            ConfigError: a size that the layout does not divide.
            DataError, OSError: reading these samples failed, possibly in the prefetch thread; a later call tries
                again.
        """
        sizes = sizes or [(self._layout.global_batch_size, 1)] * (1 + PREFETCHED_BATCHES)
        ends = pairwise(accumulate((samples for samples, _ in sizes), initial=first_sample))
        wanted = [(*span, parts) for span, (_, parts) in zip(ends, sizes, strict=True)]
        for old in [batch for batch in self._pending if batch not in wanted]:  # after a jump in the order
            self._pending.pop(old).cancel()
        for each in wanted:
            if each not in self._pending:
                self._pending[each] = self._pool.submit(self._load, *each)
        return self._pending.pop(wanted[0]).result()

    def _load(self, first: int, end: int, parts: int) -> GlobalBatch:
        layout = replace(self._layout, global_batch_size=(end - first) * parts)
        batch = _assemble(self._samples, layout, first, end, parts)
        return batch if self._prepare is None else self._prepare(batch)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ValidationLoader:
    """All validation samples once, in full global batches; the last is padded with samples without targets.

    All ranks get the same number of batches and micro-batches.
    """

    def __init__(self, samples: ValidationSamples, layout: BatchLayout) -> None:
        self._samples, self._layout = samples, layout

    def __len__(self) -> int:
        return (len(self._samples) + self._layout.global_batch_size - 1) // self._layout.global_batch_size

    def __iter__(self) -> Iterator[GlobalBatch]:
        return map(self.batch, range(len(self)))

    def batch(self, index: int) -> GlobalBatch:
        """Return global batch `index`; its `sample_range` ends with the last real sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        first = index * self._layout.global_batch_size
        end = min(first + self._layout.global_batch_size, len(self._samples))
        return _assemble(self._samples, self._layout, first, end)


@dataclass(frozen=True)
class ScoredSequence:
    """A sequence whose last tokens are scored.

    Attributes:
        tokens: [n], n at least 2; the last token is a target only.
        first: index of the first scored token, at least 1.
    """

    tokens: npt.NDArray[np.integer]
    first: int

    @property
    def targets(self) -> int:
        return len(self.tokens) - self.first


class SequenceBatches:
    """Sequences of different lengths for evaluation: similar ones together, which takes little padding.

    The longest come first, so that a lack of memory shows at once.
    """

    def __init__(self, sequences: Sequence[ScoredSequence], batch_size: int) -> None:
        self._sequences, self._size = sequences, batch_size
        self._order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))

    def __len__(self) -> int:
        return (len(self._order) + self._size - 1) // self._size

    def __iter__(self) -> Iterator[GlobalBatch]:
        return map(self.batch, range(len(self)))

    def indices(self, index: int) -> list[int]:
        """The sequence in each row of batch `index`."""
        return self._order[index * self._size : (index + 1) * self._size]

    def batch(self, index: int) -> GlobalBatch:
        rows = [self._sequences[number] for number in self.indices(index)]
        shape = len(rows), len(rows[0].tokens) - 1
        tokens, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for row, sequence in enumerate(rows):
            length = len(sequence.tokens) - 1
            tokens[row, :length] = sequence.tokens[:-1]
            labels[row, sequence.first - 1 : length] = sequence.tokens[sequence.first :]
        first = index * self._size
        targets = sum(sequence.targets for sequence in rows)
        return GlobalBatch((MicroBatch(tokens, labels, None),), targets, (first, first + len(rows)))


def common_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _assemble(samples: Samples, layout: BatchLayout, first: int, end: int, parts: int = 1) -> GlobalBatch:
    """Return the rank's part of samples [first, end), padded to the layout's size with samples without targets.

    Args:
        parts: equal ones, that each sample is cut into.
    """
    micro_batches = tuple(
        _micro_batch(
            samples, [(first + offset // parts, offset % parts) for offset in layout.offsets(micro)], end, parts
        )
        for micro in range(layout.micro_batches)
    )
    targets = [samples.target_count(index) for index in range(first, end)]
    by_dataset: tuple[int, ...] = ()
    if samples.dataset_count > 1:
        datasets = [samples.dataset_of(index) for index in range(first, end)]
        by_dataset = tuple(np.bincount(datasets, targets, samples.dataset_count).astype(int).tolist())
    padding = sum(samples.padding(index) for index in range(first, end))
    return GlobalBatch(micro_batches, sum(targets), (first, end), padding, by_dataset)


def _micro_batch(samples: Samples, places: list[tuple[int, int]], end: int, parts: int) -> MicroBatch:
    """Return the sequences at `places`: each a sample and its part."""
    length = samples.sequence_length // parts
    shape = len(places), length
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int32) if samples.document_mask else None
    datasets = np.zeros(len(places), dtype=np.int64) if samples.dataset_count > 1 else None
    read = lru_cache(maxsize=1)(samples.sample)  # parts of a sample follow each other
    numbers = lru_cache(maxsize=1)(samples.documents)
    for row, (index, part) in enumerate(places):
        if index < end:
            here = slice(part * length, (part + 1) * length)
            tokens[row], labels[row] = (values[here] for values in read(index))
            if documents is not None:
                documents[row] = numbers(index)[here]
            if datasets is not None:
                datasets[row] = samples.dataset_of(index)
    return MicroBatch(tokens, labels, documents, datasets)
