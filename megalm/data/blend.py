"""Samples of several datasets, mixed by weight, with other weights from a later sample on.

The mixture is Megatron-LM's: always the dataset that is furthest behind its share. It does not depend on how many
samples are asked for, and a dataset goes on where it was when the weights change, so nothing is read twice early.
k number of a sample, M datasets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megalm.data.samples import TrainingSamples
from megalm.errors import ConfigError

BLOCK_SAMPLES = 1 << 16


@dataclass(frozen=True)
class Stage:
    """From sample `first` on, the datasets are mixed by `weights` [M]; a weight of 0 leaves one out."""

    first: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Consumed:
    """What a run has read of a dataset."""

    prefix: str
    samples: int
    epochs: float


def mix(
    weights: npt.NDArray[np.float64], first: int, counts: npt.NDArray[np.int64], length: int
) -> npt.NDArray[np.int16]:
    """[length] the dataset of each sample from the `first` of a stage on; `counts` [M] so far are updated."""
    chosen = np.empty(length, dtype=np.int16)
    weight, count = weights.tolist(), counts.tolist()
    numbers = range(len(weight))
    for place in range(length):
        step = max(first + place, 1)
        best, most = -1, 0.0
        for number in numbers:
            behind = weight[number] * step - count[number]
            if weight[number] > 0 and (best < 0 or behind > most):  # the first one where several are alike
                best, most = number, behind
        count[best] += 1
        chosen[place] = best
    counts[:] = count
    return chosen


class BlendedSamples:
    """The mixture as samples, like those of one dataset.

    Raises:
        ConfigError: weights that are negative, all nothing, or not one for each dataset; stages out of order; datasets
            of different sequence lengths.
    """

    def __init__(self, parts: Sequence[TrainingSamples], stages: Sequence[Stage]) -> None:
        _check(parts, stages)
        self.parts, self.stages = list(parts), list(stages)
        self.sequence_length, self.document_mask = parts[0].sequence_length, parts[0].document_mask
        facts = [part.fingerprint for part in parts], [(stage.first, stage.weights) for stage in stages]
        self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
        self._shares = [np.array(stage.weights) / sum(stage.weights) for stage in stages]
        # Counts at the start of each block of each stage, as far as anybody has asked.
        self._starts = [[np.zeros(len(parts), dtype=np.int64)] for _ in stages]
        self._block = lru_cache(maxsize=4)(self._mixed_block)
        self._before: list[npt.NDArray[np.int64]] = [np.zeros(len(parts), dtype=np.int64)]
        for number, (stage, after) in enumerate(pairwise(stages)):
            self._before.append(self._before[-1] + self._counts_in(number, after.first - stage.first))

    def locate(self, index: int) -> tuple[int, int]:
        """(dataset, number of its own sample) of sample `index`."""
        stage, offset = self._stage_of(index)
        block, place = divmod(offset, BLOCK_SAMPLES)
        chosen = self._block(stage, block)
        dataset = int(chosen[place])
        inside = int(np.count_nonzero(chosen[:place] == dataset))
        return dataset, int(self._before[stage][dataset] + self._starts[stage][block][dataset]) + inside

    def sample(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        dataset, number = self.locate(index)
        return self.parts[dataset].sample(number)

    def documents(self, index: int) -> npt.NDArray[np.int32]:
        dataset, number = self.locate(index)
        return self.parts[dataset].documents(number)

    def target_count(self, index: int) -> int:
        dataset, number = self.locate(index)
        return self.parts[dataset].target_count(number)

    def consumed(self, samples: int) -> list[Consumed]:
        """What the first `samples` are made of, for each dataset."""
        stage, offset = self._stage_of(samples)
        counts = self._before[stage] + self._counts_in(stage, offset)
        return [
            Consumed(part.dataset.prefix, int(count), int(count) / part.samples_per_epoch)
            for part, count in zip(self.parts, counts, strict=True)
        ]

    def _stage_of(self, index: int) -> tuple[int, int]:
        if index < 0:
            raise IndexError(f"sample {index}")
        number = max(number for number, stage in enumerate(self.stages) if stage.first <= index)
        return number, index - self.stages[number].first

    def _counts_in(self, stage: int, samples: int) -> npt.NDArray[np.int64]:
        """[M] samples of each dataset among the first of a stage."""
        block, place = divmod(samples, BLOCK_SAMPLES)
        chosen = self._block(stage, block)[:place]
        counts: npt.NDArray[np.int64] = np.bincount(chosen, minlength=len(self.parts)).astype(np.int64)
        return counts + self._starts[stage][block]

    def _mixed_block(self, stage: int, block: int) -> npt.NDArray[np.int16]:
        starts = self._starts[stage]
        for known in range(len(starts) - 1, block):  # a block needs the counts of all before it
            counts = starts[known].copy()
            mix(self._shares[stage], known * BLOCK_SAMPLES, counts, BLOCK_SAMPLES)
            starts.append(counts)
        return mix(self._shares[stage], block * BLOCK_SAMPLES, starts[block].copy(), BLOCK_SAMPLES)


def _check(parts: Sequence[TrainingSamples], stages: Sequence[Stage]) -> None:
    if not parts or not stages or stages[0].first != 0:
        raise ConfigError("data blend: state datasets, and weights from sample 0 on")
    for stage, after in pairwise(stages):
        if after.first <= stage.first:
            raise ConfigError(
                f"data blend: stage {after.first} follows stage {stage.first}; sort them by their first samples"
            )
    for stage in stages:
        if len(stage.weights) != len(parts) or min(stage.weights) < 0 or sum(stage.weights) <= 0:
            raise ConfigError(
                f"data blend: {list(stage.weights)} are not weights of {len(parts)} datasets; "
                "state one for each, none below 0"
            )
    lengths = {(part.sequence_length, part.document_mask) for part in parts}
    if len(lengths) > 1:
        raise ConfigError(f"data blend: datasets of different sequence lengths or masks: {sorted(lengths)}")
