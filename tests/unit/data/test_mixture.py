"""Mixtures: the weights are kept at every moment, nothing is read twice early, stages go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling import mixture as blend_module
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.index_cache import ArrayCache
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage, interleave
from megalm.data.sampling.sample_order import Int64s
from megalm.data.sampling.samples import TrainingSamples
from megalm.errors import ConfigError
from tests.messages import assert_names

MakeDataset = Callable[[Sequence[int]], IndexedDataset]


@pytest.fixture
def parts(make_dataset: MakeDataset) -> list[TrainingSamples]:
    lengths = [[30, 50, 20], [41, 59], [77]]
    return [TrainingSamples(make_dataset(row), (0, len(row)), 10, seed=7) for row in lengths]


def test_datasets_have_short_names_of_their_own(make_dataset: MakeDataset, tmp_path: Path) -> None:
    def names(*prefixes: str) -> list[str]:
        parts = [TrainingSamples(make_dataset([20 + number]), (0, 1), 10, seed=7) for number in range(len(prefixes))]
        for part, prefix in zip(parts, prefixes, strict=True):
            part.dataset.prefix = prefix
        return BlendedSamples(parts, [MixtureStage(0, (1,) * len(parts))]).names

    assert names("data/web", "data/my code") == ["web", "my_code"]
    assert names("/a/web", "/b/web") == ["a_web", "b_web"]
    assert names("a b", "a_b") == ["a_b-1", "a_b-2"]


def test_the_furthest_behind_is_next() -> None:
    """By hand, for weights 1/2, 1/3, 1/6: w * max(k, 1) - count, the first one on ties."""
    counts = np.zeros(3, dtype=np.int64)
    assert interleave(np.array([3, 2, 1]) / 6, 0, counts, 12).tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0]
    assert counts.tolist() == [6, 4, 2]


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), cut=st.integers(0, 200))
@settings(max_examples=40)
def test_shares_are_kept_and_a_mixture_goes_on(weights: list[float], cut: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts, again = (np.zeros(len(weights), dtype=np.int64) for _ in range(2))
    whole = interleave(shares, 0, counts, 400)
    parts = [interleave(shares, 0, again, cut), interleave(shares, cut, again, 400 - cut)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    for end in (1, 17, 400):
        have = np.bincount(whole[:end], minlength=len(weights))
        assert np.abs(have - shares * end).max() <= len(weights)


def test_samples_are_the_parts_own_in_their_order(
    parts: list[TrainingSamples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blend_module, "BLOCK_SAMPLES", 8)
    stages = [MixtureStage(0, (2, 1, 1)), MixtureStage(21, (0, 1, 3))]
    blended = BlendedSamples(parts, stages)
    seen: list[list[int]] = [[], [], []]
    for index in range(60):
        dataset, number = blended.locate(index)
        seen[dataset].append(number)
        assert blended.sample(index)[0].tolist() == parts[dataset].sample(number)[0].tolist()
    assert [row == list(range(len(row))) for row in seen] == [True] * 3  # also over the change of the weights
    assert not [index for index in range(21, 60) if blended.locate(index)[0] == 0]
    fresh = BlendedSamples(parts, stages)  # as after a resume
    assert fresh.locate(57) == blended.locate(57)
    consumed = fresh.consumed(60)
    assert [entry.samples for entry in consumed] == [len(row) for row in seen]
    assert consumed[0].epochs == consumed[0].repetition == pytest.approx(len(seen[0]) * 10 / 100)
    for samples in (5, 21, 60, 1000):
        exact, planned = fresh.consumed(samples), fresh.planned(samples)
        assert max(abs(a.samples - b.samples) for a, b in zip(exact, planned, strict=True)) <= 2  # stages


def test_later_stages_change_nothing_before_them(parts: list[TrainingSamples]) -> None:
    one = BlendedSamples(parts, [MixtureStage(0, (1, 1, 1))])
    two = BlendedSamples(parts, [MixtureStage(0, (1, 1, 1)), MixtureStage(30, (5, 1, 1))])
    assert [one.locate(index) for index in range(30)] == [two.locate(index) for index in range(30)]
    prints = [[blended.order_fingerprint(samples) for blended in (one, two)] for samples in (0, 1, 30, 31)]
    assert [first == second for first, second in prints] == [True, True, True, False]


def test_the_identity_is_that_of_what_is_consumed(parts: list[TrainingSamples]) -> None:
    alone = BlendedSamples(parts[:1], [MixtureStage(0, (1,))])
    grown = BlendedSamples(parts, [MixtureStage(0, (5, 0, 0)), MixtureStage(10, (1, 1, 1))])
    assert grown.order_fingerprint(10) == alone.order_fingerprint(10) == parts[0].fingerprint
    assert grown.dataset_fingerprint(10) == parts[0].dataset.fingerprint
    assert grown.dataset_fingerprint(11) != grown.dataset_fingerprint(10)
    assert [grown.locate(index) for index in range(10)] == [alone.locate(index) for index in range(10)]
    assert alone.mixture(10) is grown.mixture(10) is None
    assert_names(grown.mixture(11), 0, parts[0].dataset.prefix, "100.0%", 10, parts[2].dataset.prefix, "33.3%")
    base = BlendedSamples(parts, [MixtureStage(0, (2, 1, 0))])
    for other in (
        [MixtureStage(0, (1, 2, 0))],
        [MixtureStage(0, (2, 0, 1))],
        [MixtureStage(0, (2, 1, 0)), MixtureStage(5, (1, 1, 0))],
    ):
        assert BlendedSamples(parts, other).order_fingerprint(10) != base.order_fingerprint(10)
    assert BlendedSamples(parts[:2], [MixtureStage(0, (4, 2))]).order_fingerprint(10) == base.order_fingerprint(10)


def test_counts_of_a_long_mixture_are_kept(
    parts: list[TrainingSamples], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(blend_module, "BLOCK_SAMPLES", 8)
    monkeypatch.setattr(blend_module, "KEPT_BLOCKS", 3)
    stages = [MixtureStage(0, (5, 3, 1))]
    plain = [BlendedSamples(parts, stages).locate(index) for index in range(200)]
    assert [BlendedSamples(parts, stages, ArrayCache(tmp_path)).locate(index) for index in (199, 71, 72)] == [
        plain[index] for index in (199, 71, 72)
    ]
    mixed: list[int] = []

    def count(weights: np.ndarray, first: int, counts: np.ndarray, length: int) -> np.ndarray:
        mixed.append(first)
        return interleave(weights, first, counts, length)

    monkeypatch.setattr(blend_module, "interleave", count)
    assert BlendedSamples(parts, stages, ArrayCache(tmp_path)).locate(197) == plain[197]
    assert mixed == [192]  # only its own block


def test_two_threads_may_ask_first(parts: list[TrainingSamples], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader reads ahead in one, while the loop asks what was consumed."""
    stages = [MixtureStage(0, (2, 1, 1)), MixtureStage(20, (1, 0, 3)), MixtureStage(50, (1, 1, 1))]
    expected = BlendedSamples(parts, stages).consumed(80)
    asked, both = BlendedSamples(parts, stages), threading.Barrier(2)
    counts_in = BlendedSamples._counts_in

    def together(self: BlendedSamples, stage: int, samples: int) -> Int64s:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return counts_in(self, stage, samples)

    monkeypatch.setattr(BlendedSamples, "_counts_in", together)
    with ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in [pool.submit(asked.consumed, 80) for _ in range(2)]] == 2 * [expected]
    assert asked.consumed(80) == expected


def test_the_loader_takes_a_blend(parts: list[TrainingSamples]) -> None:
    blended = BlendedSamples(parts, [MixtureStage(0, (1, 2, 3))])
    with BatchLoader(blended, BatchLayout(4, 2, 0, 1)) as loader:
        batch = loader.batch(8)
    rows = np.concatenate([part.tokens for part in batch.micro_batches])
    assert rows.tolist() == [blended.sample(index)[0].tolist() for index in range(8, 12)]


def test_refusals(parts: list[TrainingSamples], make_dataset: MakeDataset) -> None:
    other = TrainingSamples(make_dataset([50]), (0, 1), 5, seed=7)
    refused: tuple[tuple[list[TrainingSamples], list[MixtureStage], tuple[object, ...]], ...] = (
        (parts, [MixtureStage(0, (1, 1))], ([1, 1], 3)),
        (parts, [MixtureStage(0, (1, -1, 1))], ([1, -1, 1], 3)),
        (parts, [MixtureStage(5, (1, 1, 1))], (0,)),
        (parts, [MixtureStage(0, (1, 1, 1)), MixtureStage(7, (1, 1, 1)), MixtureStage(7, (1, 1, 1))], (7,)),
        ([parts[0], other], [MixtureStage(0, (1, 1))], (5, 10)),
    )
    for made, stages, names in refused:
        with pytest.raises(ConfigError) as error:
            BlendedSamples(made, stages)
        assert_names(error.value, *names)
