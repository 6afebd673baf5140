"""Mix samples of several datasets by weight; the weights can change at a given sample.

As in Megatron-LM, each sample comes from the dataset that is furthest behind its share. The mixture does not depend on
the number of requested samples, and a dataset continues where it was when the weights change, so no sample is read
again before its epoch ends. k: sample number, M: datasets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.data.sampling.index_cache import ArrayCache, Arrays
from megalm.data.sampling.sample_order import Int64s
from megalm.data.sampling.samples import Samples, TrainingSamples, hash_of
from megalm.errors import ConfigError

BLOCK_SAMPLES = 1 << 16
KEPT_BLOCKS = 64  # blocks between cached counts: a resume late in a long run need not mix everything again
MIX_VERSION = 1


@dataclass(frozen=True)
class MixtureStage:
    """From sample `first` on, the datasets are mixed by `weights` [M]; a weight of 0 leaves one out."""

    first: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class DatasetUsage:
    """How much of a dataset a run reads.

    Attributes:
        epochs: passes over its samples.
        repetition: how often each token is seen; more than `epochs` if samples overlap.
    """

    prefix: str
    samples: int
    epochs: float
    repetition: float


def interleave(
    weights: npt.NDArray[np.float64], first: int, counts: npt.NDArray[np.int64], length: int
) -> npt.NDArray[np.int16]:
    """Return [length] the dataset of each sample from sample `first` of a stage on; updates `counts` [M]."""
    chosen = np.empty(length, dtype=np.int16)
    weight, count = weights.tolist(), counts.tolist()
    numbers = range(len(weight))
    for place in range(length):
        step = max(first + place, 1)
        best, most = -1, 0.0
        for number in numbers:
            behind = weight[number] * step - count[number]
            if weight[number] > 0 and (best < 0 or behind > most):  # the first one if several are equal
                best, most = number, behind
        count[best] += 1
        chosen[place] = best
    counts[:] = count
    return chosen


class BlendedSamples(Samples):
    """The samples of a mixture of one or more datasets, with the interface of a single dataset's samples.

    Args:
        cache: stores the counts of long mixtures.

    Raises:
        ConfigError: weights that are negative, all zero, or not one per dataset; stages out of order; datasets of
            different sequence lengths.
    """

    def __init__(
        self, parts: Sequence[TrainingSamples], stages: Sequence[MixtureStage], cache: ArrayCache | None = None
    ) -> None:
        _check(parts, stages)
        self.parts, self.stages = list(parts), list(stages)
        self.sequence_length, self.document_mask = parts[0].sequence_length, parts[0].document_mask
        self.lengths_before: tuple[tuple[int, int], ...] = ()  # (sequence length, its samples) before each change
        self._cache = cache or ArrayCache(None)
        self._shares = [_sample_shares(stage.weights, parts) for stage in stages]
        used = [np.flatnonzero(share).tolist() for share in self._shares]
        self._alone = [one[0] if len(one) == 1 else None for one in used]  # a stage's dataset, if it has only one
        # Counts [M] at the start of (stage, block) and at the start of each stage, filled on demand.
        self._starts: dict[tuple[int, int], Int64s] = {}
        self._before: dict[int, Int64s] = {0: np.zeros(len(parts), dtype=np.int64)}
        self._block = lru_cache(maxsize=4)(self._mixed_block)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (dataset, sample number within that dataset) of sample `index`."""
        stage, offset = self._stage_of(index)
        alone = self._alone[stage]
        if alone is not None:
            return alone, int(self._counts_before(stage)[alone]) + offset
        block, place = divmod(offset, BLOCK_SAMPLES)
        chosen, numbers = self._block(stage, block)
        dataset = int(chosen[place])
        return dataset, int(self._counts_before(stage)[dataset] + numbers[place])

    def sample(self, index: int) -> tuple[Int64s, Int64s]:
        dataset, number = self.locate(index)
        return self.parts[dataset].sample(number)

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        dataset, number = self.locate(index)
        return self.parts[dataset].documents(number)

    def target_count(self, index: int) -> int:
        if all(part.all_are_targets for part in self.parts):
            return self.sequence_length
        dataset, number = self.locate(index)
        return self.parts[dataset].target_count(number)

    def padding(self, index: int) -> int:
        if all(part.packing == "stream" for part in self.parts):
            return 0
        dataset, number = self.locate(index)
        return self.parts[dataset].padding(number)

    def consumed(self, samples: int) -> list[DatasetUsage]:
        """Return each dataset's usage in the first `samples`, counted exactly."""
        stage, offset = self._stage_of(samples)
        return self._usage(self._counts_before(stage) + self._counts_in(stage, offset))

    def planned(self, samples: int) -> list[DatasetUsage]:
        """As `consumed`, computed from the weights: constant time, and exact to within one per dataset and stage."""
        counts = np.zeros(len(self.parts))
        ends = [stage.first for stage in self.stages[1:]] + [samples]
        for stage, share, end in zip(self.stages, self._shares, ends, strict=True):
            counts += share * max(0, min(end, samples) - stage.first)
        return self._usage(np.round(counts))

    @property
    def names(self) -> list[str]:
        """A short name of each dataset, without two that are equal: the last part of its prefix, or more of it."""
        prefixes = [Path(part.dataset.prefix).parts for part in self.parts]
        longest = max(map(len, prefixes))
        for count in range(1, longest + 1):
            names = [re.sub(r"[^\w.-]", "_", "_".join(parts[-count:])) for parts in prefixes]
            if len(set(names)) == len(names):
                return names
        return [f"{name}-{number}" for number, name in enumerate(names, start=1)]

    @property
    def dataset_count(self) -> int:
        return len(self.parts)

    def dataset_of(self, index: int) -> int:
        return self.locate(index)[0]

    def planned_padding(self, samples: int) -> int:
        """Return about how many positions of the first `samples` hold no token."""
        usage = zip(self.parts, self.planned(samples), strict=True)
        return round(sum(planned.samples * part.sequence_length * part.padding_share for part, planned in usage))

    def recut(self, consumed: int, sequence_length: int) -> BlendedSamples:
        """Return samples of another length that continue after `consumed` of these, mixed by the weights at that point.

        Raises:
            ConfigError: a dataset's rest cannot be recut.
        """
        stage, _ = self._stage_of(consumed)
        parts = [
            part.recut(seen.samples, sequence_length)
            for part, seen in zip(self.parts, self.consumed(consumed), strict=True)
        ]
        after = BlendedSamples(parts, [MixtureStage(0, self.stages[stage].weights)], self._cache)
        after.lengths_before = (*self.lengths_before, (self.sequence_length, consumed))
        return after

    @property
    def recut_tokens(self) -> tuple[int, int]:
        """Number of tokens that recutting skips, and that it reads twice."""
        counts = [part.recut_tokens for part in self.parts]
        return sum(skipped for skipped, _ in counts), sum(repeated for _, repeated in counts)

    def order_fingerprint(self, samples: int) -> str:
        """Return a hash of the order of the first `samples`; later samples can still change."""
        used, stages = self._used(samples)
        if len(used) == 1:
            return self.parts[used[0]].fingerprint  # however the mixture was configured
        order = [(stage.first, share[used].tolist()) for stage, share in zip(stages, self._shares, strict=False)]
        return hash_of([self.parts[number].fingerprint for number in used], order)

    def dataset_fingerprint(self, samples: int) -> str:
        """Return a hash of the datasets that the first `samples` come from."""
        prints = [self.parts[number].dataset.fingerprint for number in self._used(samples)[0]]
        return prints[0] if len(prints) == 1 else hash_of(prints)

    def mixture(self, samples: int) -> str | None:
        """Describe the mixture of the first `samples`; None for a single dataset. Dataset names do not identify it."""
        used, stages = self._used(samples)
        if len(used) == 1:
            return None
        words = []
        for stage, shares in zip(stages, self._shares, strict=False):
            parts = [f"{self.parts[number].dataset.prefix} {shares[number]:.1%}" for number in used if shares[number]]
            words.append(f"from sample {stage.first:,} {', '.join(parts)}")
        return "; ".join(words)

    def _used(self, samples: int) -> tuple[list[int], list[MixtureStage]]:
        stages = [stage for stage in self.stages if stage.first < max(samples, 1)]
        weights = np.sum([stage.weights for stage in stages], axis=0)
        return np.flatnonzero(weights).tolist(), stages

    def _usage(self, counts: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> list[DatasetUsage]:
        return [
            DatasetUsage(
                part.dataset.prefix,
                int(count),
                int(count) / part.samples_per_epoch,
                int(count) / part.samples_per_epoch * (part.sequence_length / part.stride),
            )
            for part, count in zip(self.parts, counts, strict=True)
        ]

    def _stage_of(self, index: int) -> tuple[int, int]:
        if index < 0:
            raise IndexError(f"sample {index}")
        number = max(number for number, stage in enumerate(self.stages) if stage.first <= index)
        return number, index - self.stages[number].first

    def _counts_before(self, stage: int) -> Int64s:
        """Return [M] the samples of each dataset before a stage."""
        for number in range(stage):
            if number + 1 not in self._before:  # keyed by number: another thread can compute the same one
                length = self.stages[number + 1].first - self.stages[number].first
                self._before[number + 1] = self._before[number] + self._counts_in(number, length)
        return self._before[stage]

    def _counts_in(self, stage: int, samples: int) -> Int64s:
        """Return [M] the samples of each dataset among the first `samples` of a stage."""
        alone, counts = self._alone[stage], np.zeros(len(self.parts), dtype=np.int64)
        if alone is not None:
            counts[alone] = samples
            return counts
        block, place = divmod(samples, BLOCK_SAMPLES)
        if place:
            counts += np.bincount(self._block(stage, block)[0][:place], minlength=len(self.parts))
        return counts + self._start(stage, block)

    def _mixed_block(self, stage: int, block: int) -> tuple[npt.NDArray[np.int16], Int64s]:
        """Return [BLOCK_SAMPLES] each sample's dataset, and its number among that dataset's samples in the stage."""
        start = self._start(stage, block)
        counts = start.copy()
        chosen = interleave(self._shares[stage], block * BLOCK_SAMPLES, counts, BLOCK_SAMPLES)
        self._starts[stage, block + 1] = counts
        numbers: npt.NDArray[np.int64] = np.empty(BLOCK_SAMPLES, dtype=np.int64)
        for dataset, first in enumerate(start):
            places = np.flatnonzero(chosen == dataset)
            numbers[places] = np.arange(first, first + len(places))
        return chosen, numbers

    def _start(self, stage: int, block: int) -> Int64s:
        """Return [M] the counts at the start of a block, within its stage."""
        if (stage, block) not in self._starts:
            shares, reached = self._shares[stage], 0
            counts: npt.NDArray[np.int64] = np.zeros(len(self.parts), dtype=np.int64)
            for kept in range(KEPT_BLOCKS, block + 1, KEPT_BLOCKS):
                facts = (MIX_VERSION, "mixture", shares.tolist(), BLOCK_SAMPLES, kept)
                counts = self._cache.get(facts, partial(_mixed_on, shares, counts, reached, kept))["counts"]
                reached = kept
            self._starts[stage, block] = _mixed_on(shares, counts, reached, block)["counts"]
        return self._starts[stage, block]


def _mixed_on(shares: npt.NDArray[np.float64], counts: Int64s, block: int, end: int) -> Arrays:
    """Return the counts [M] at the start of block `end`, given those at the start of `block`."""
    counts = np.array(counts)
    for number in range(block, end):
        interleave(shares, number * BLOCK_SAMPLES, counts, BLOCK_SAMPLES)
    return {"counts": counts}


def _sample_shares(weights: Sequence[float], parts: Sequence[TrainingSamples]) -> npt.NDArray[np.float64]:
    """Return the shares of the samples [M] that give these shares of the tokens."""
    padding = np.array([part.padding_share for part in parts])
    if not padding.any():
        return np.array(weights) / sum(weights)
    samples = np.array(weights) / (1 - padding)
    return np.asarray(samples / samples.sum())


def _check(parts: Sequence[TrainingSamples], stages: Sequence[MixtureStage]) -> None:
    if not parts or not stages or stages[0].first != 0:
        raise ConfigError("data blend: give datasets, and weights from sample 0 on")
    for stage, after in pairwise(stages):
        if after.first <= stage.first:
            raise ConfigError(
                f"data blend: stage {after.first} follows stage {stage.first}; sort them by their first samples"
            )
    for stage in stages:
        if len(stage.weights) != len(parts) or min(stage.weights) < 0 or sum(stage.weights) <= 0:
            raise ConfigError(
                f"data blend: {list(stage.weights)} are not valid weights for {len(parts)} datasets; "
                "give one for each, none below 0 and at least one above"
            )
    lengths = {(part.sequence_length, part.document_mask) for part in parts}
    if len(lengths) > 1:
        raise ConfigError(f"data blend: the datasets have different sequence lengths or masks: {sorted(lengths)}")
