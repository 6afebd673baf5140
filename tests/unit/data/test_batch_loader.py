"""The loader: every layout sees the same samples, errors reach the caller, the thread ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader, GlobalBatch, ValidationLoader
from megalm.data.sampling.samples import IGNORE_INDEX, TrainingSamples, ValidationSamples
from megalm.errors import ConfigError
from tests.messages import assert_names

MakeDataset = Callable[[Sequence[int]], IndexedDataset]
LAYOUTS = [(12, 1), (6, 2), (3, 4), (1, 12), (1, 3), (2, 3)]  # micro-batch, ranks; 12 samples a batch


def rows(batches: Sequence[GlobalBatch]) -> np.ndarray:
    """All samples of a global batch, from the batches of all ranks, put back in their order."""
    micros = [[batch.micro_batches[m] for batch in batches] for m in range(len(batches[0].micro_batches))]
    return np.concatenate([micro.tokens for ranks in micros for micro in ranks])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("micro", "ranks"), LAYOUTS)
def test_every_layout_sees_the_same_samples(make_dataset: MakeDataset, micro: int, ranks: int, masked: bool) -> None:
    samples = TrainingSamples(make_dataset([7, 3, 20, 1, 9]), (0, 5), 5, seed=3, document_mask=masked)
    batches = []
    for rank in range(ranks):
        with BatchLoader(samples, BatchLayout(12, micro, rank, ranks)) as loader:
            batches.append(loader.batch(24))
    assert rows(batches).tolist() == [samples.sample(index)[0].tolist() for index in range(24, 36)]
    labels = np.concatenate([samples.sample(index)[1] for index in range(24, 36)])
    for batch in batches:
        assert batch.target_count == (labels != IGNORE_INDEX).sum()
        assert batch.sample_range == (24, 36)
        assert len(batch.micro_batches) == 12 // micro // ranks
        for part in batch.micro_batches:
            assert part.tokens.shape == part.labels.shape == (micro, 5)
            assert (part.tokens.dtype, part.labels.dtype) == (np.int64, np.int64)
            assert (part.documents is not None) == masked
    if masked:
        assert batches[0].target_count < 60
        first = batches[0].micro_batches[0].documents
        assert first is not None
        assert first[0].tolist() == samples.documents(24).tolist()
    else:
        assert batches[0].target_count == 60


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("micro", "ranks"), LAYOUTS)
def test_samples_are_cut_into_parts(make_dataset: MakeDataset, micro: int, ranks: int, masked: bool) -> None:
    """The same tokens, labels and targets as uncut, also in batches of other sizes around it."""
    samples = TrainingSamples(make_dataset([7, 3, 20, 1, 9]), (0, 5), 6, seed=3, document_mask=masked)
    whole = [samples.sample(index) for index in range(24, 28)]
    batches = []
    for rank in range(ranks):
        with BatchLoader(samples, BatchLayout(12, micro, rank, ranks)) as loader:
            loader.batch(12, [(12, 1), (4, 3), (24, 1)])
            batches.append(loader.batch(24, [(4, 3), (24, 1), (8, 3)]))
            assert loader.batch(28, [(24, 1)]).sample_range == (28, 52)
    assert rows(batches).reshape(4, 6).tolist() == [tokens.tolist() for tokens, _ in whole]
    labels = np.concatenate([labels for _, labels in whole])
    micros = [[batch.micro_batches[m] for batch in batches] for m in range(len(batches[0].micro_batches))]
    assert np.concatenate([micro.labels for rank in micros for micro in rank]).ravel().tolist() == labels.tolist()
    for batch in batches:
        assert (batch.target_count, batch.sample_range) == ((labels != IGNORE_INDEX).sum(), (24, 28))
        assert {micro.tokens.shape for micro in batch.micro_batches} == {(micro, 2)}
    if masked:
        found = [micro.documents for rank in micros for micro in rank]
        expected = [samples.documents(index).tolist() for index in range(24, 28)]
        assert np.concatenate([each for each in found if each is not None]).reshape(4, 6).tolist() == expected


def test_a_batch_that_cannot_be_divided() -> None:
    with pytest.raises(ConfigError) as error:
        BatchLayout(12, 5, 0, 2)
    assert_names(error.value, "train_batch_size", 12, 5, 2, 10)


class Watched:
    """Real samples, with a note of what was read and by which thread, and errors on request."""

    def __init__(self, samples: TrainingSamples) -> None:
        self._samples = samples
        self.read: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.broken: set[int] = set()
        self.changed = threading.Condition()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._samples, name)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        with self.changed:
            self.read.append(index)
            self.threads.add(threading.current_thread())
            self.changed.notify_all()
        if index in self.broken:
            raise OSError(f"sample {index}: disk gone")
        return self._samples.sample(index)

    def wait_for(self, index: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: index in self.read, timeout=20)


@pytest.fixture
def watched(make_dataset: MakeDataset) -> Watched:
    return Watched(TrainingSamples(make_dataset([50]), (0, 1), 5, seed=3))


def test_reads_two_batches_ahead_and_no_more(watched: Watched) -> None:
    with BatchLoader(watched, BatchLayout(2, 2, 0, 1)) as loader:  # type: ignore[arg-type]
        loader.batch(0)
        assert watched.wait_for(5)
        loader.batch(2)
        assert watched.wait_for(7)
        loader.batch(100)
        assert watched.wait_for(105)
    assert sorted(watched.read) == [*range(8), *range(100, 106)]
    assert threading.current_thread() not in watched.threads
    assert not any(thread.is_alive() for thread in watched.threads)


def test_the_thread_prepares_the_batches_ahead(make_dataset: MakeDataset) -> None:
    """As for a GPU: the step that needs a batch finds it in pinned memory, and its own thread pins none."""
    samples = TrainingSamples(make_dataset([7, 3, 20, 1, 9]), (0, 5), 5, seed=3, document_mask=True)
    prepared: list[tuple[str, int]] = []

    def prepare(batch: GlobalBatch) -> GlobalBatch:
        prepared.append((threading.current_thread().name, batch.sample_range[0]))
        return replace(batch, target_count=-1)

    with BatchLoader(samples, BatchLayout(4, 2, 0, 1), prepare) as loader:
        assert loader.batch(0).target_count == -1
        loader.batch(4)
    assert {first for _, first in prepared} >= {0, 4, 8}
    assert all(name.startswith("batches") for name, _ in prepared)


def test_an_error_reaches_the_caller_and_the_thread_lives(watched: Watched) -> None:
    watched.broken = {3}
    with BatchLoader(watched, BatchLayout(2, 2, 0, 1)) as loader:  # type: ignore[arg-type]
        assert loader.batch(0).sample_range == (0, 2)
        with pytest.raises(OSError, match="sample 3: disk gone"):
            loader.batch(2)
        watched.broken = set()
        assert loader.batch(2).sample_range == (2, 4)
        watched.broken = {9}
        assert loader.batch(4).sample_range == (4, 6)
        with pytest.raises(OSError, match="sample 9: disk gone"):
            loader.batch(8)


def test_close_ends_the_thread_also_when_called_twice(watched: Watched) -> None:
    loader = BatchLoader(watched, BatchLayout(2, 1, 0, 2))  # type: ignore[arg-type]
    loader.batch(0)
    loader.close()
    loader.close()
    assert not any(thread.is_alive() for thread in watched.threads)


@pytest.mark.parametrize(("micro", "ranks"), LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_validation_is_whole_batches_and_every_target_once(
    make_dataset: MakeDataset, micro: int, ranks: int, masked: bool
) -> None:
    samples = ValidationSamples(make_dataset([40, 60, 38]), (0, 3), 5, document_mask=masked)
    assert len(samples) == 28
    loaders = [ValidationLoader(samples, BatchLayout(12, micro, rank, ranks)) for rank in range(ranks)]
    assert [len(loader) for loader in loaders] == [3] * ranks
    seen: list[int] = []
    for batches in zip(*loaders, strict=True):
        labels = np.concatenate([part.labels for batch in batches for part in batch.micro_batches])
        assert len(labels) == 12
        assert {batch.target_count for batch in batches} == {int((labels != IGNORE_INDEX).sum())}
        seen += labels[labels != IGNORE_INDEX].tolist()
    assert loaders[0].batch(2).sample_range == (24, 28)
    starts = {40, 100} if masked else set()
    assert sorted(seen) == [label for label in range(1, 138) if label not in starts]
    with pytest.raises(IndexError):
        loaders[0].batch(3)


def test_one_rank_and_four_agree_on_padding(make_dataset: MakeDataset, tmp_path: Path) -> None:
    samples = ValidationSamples(make_dataset([16]), (0, 1), 5)
    last = ValidationLoader(samples, BatchLayout(4, 1, 3, 4)).batch(0)
    assert last.target_count == 15
    assert last.micro_batches[0].labels.tolist() == [[IGNORE_INDEX] * 5]
    assert last.micro_batches[0].tokens.tolist() == [[0] * 5]
