"""Random tokens for benchmarks of the training step, and the batches that a rank reads of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalm.data.indexed.dataset import IndexedDataset, best_dtype
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.samples import TrainingSamples
from megalm.planning.resolve import ResolvedRun

_DOCUMENTS = 64


def write_random_tokens(prefix: Path, vocabulary: int, sequence: int) -> None:
    """A dataset of 64 documents, each of eight samples."""
    random = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, best_dtype(vocabulary))
    for _ in range(_DOCUMENTS):
        writer.append(random.integers(0, vocabulary, size=sequence * 8))
    writer.close()


def random_batches(run: ResolvedRun, prefix: Path, rank: int) -> BatchLoader:
    samples = TrainingSamples(IndexedDataset(prefix), (0, _DOCUMENTS), run.config.data.sequence_length, seed=1)
    batch, place = run.batch, run.topology.coordinate(rank).data
    return BatchLoader(samples, BatchLayout(batch.global_batch, batch.micro_batch, place, batch.data_parallel))
