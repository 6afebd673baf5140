"""Best-fit packing: nothing lost, nothing cut that fits, the same for any length of the run and at any time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.data.analysis.dataset_info import describe
from megalm.data.analysis.sample_sources import spans_of
from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling import packing as packing_module
from megalm.data.sampling.batch_loader import BatchLayout, BatchLoader
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.packing import best_fit_decreasing, expected_padding
from megalm.data.sampling.samples import IGNORE_INDEX, TrainingSamples, ValidationSamples
from megalm.errors import ConfigError, DataError
from tests.messages import assert_names

MakeDataset = Callable[[Sequence[int]], IndexedDataset]
LENGTHS = [3, 12, 5, 2, 7, 1, 0, 6]
per_example = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
some_lengths = st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(lambda lengths: max(lengths) >= 2)


def packed(
    dataset: IndexedDataset, length: int = 8, seed: int = 5, mask: bool = True, cache: Path | None = None
) -> TrainingSamples:
    documents = (0, len(dataset))
    return TrainingSamples(dataset, documents, length, seed, document_mask=mask, cache=cache, packing="best_fit")


def rows(samples: TrainingSamples, first: int, count: int) -> list[list[int]]:
    return [samples.place(index).positions.tolist() for index in range(first, first + count)]


def labels_of(samples: TrainingSamples | ValidationSamples, indices: range) -> Counter[int]:
    labels = [samples.sample(index)[1] for index in indices]
    return Counter(int(label) for row in labels for label in row if label != IGNORE_INDEX)


def every_label_of(lengths: Sequence[int]) -> Counter[int]:
    """All tokens but the first of each document, for datasets whose tokens are 0, 1, 2, ..."""
    starts = np.concatenate(([0], np.cumsum(lengths)))[:-1]
    return Counter(set(range(sum(lengths))) - set(starts.tolist()))


def by_hand(sizes: Sequence[int], capacity: int) -> list[int]:
    """The fill of each bin, one item after another; which of two equally full bins takes an item is no matter."""
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, fill in enumerate(bins) if fill + size <= capacity]
        if fitting:
            bins[max(fitting, key=bins.__getitem__)] += size
        else:
            bins.append(size)
    return sorted(bins)


@given(capacity=st.integers(2, 40), data=st.data())
@settings(max_examples=200)
def test_best_fit_decreasing_item_by_item(capacity: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    items, bin_of = best_fit_decreasing(np.array(sizes), capacity)
    assert sorted(items.tolist()) == list(range(len(sizes)))
    assert sorted(np.bincount(bin_of, weights=np.array(sizes)[items]).tolist()) == by_hand(sizes, capacity)


@given(lengths=some_lengths, sequence_length=st.integers(1, 12), seed=st.integers(0, 2**40), window=st.integers(1, 30))
@per_example
def test_every_token_once_an_epoch_and_no_document_cut_that_fits(
    make_dataset: MakeDataset, lengths: list[int], sequence_length: int, seed: int, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing_module, "WINDOW_PIECES", window)
        samples = packed(make_dataset(lengths), sequence_length, seed)
    count = int(samples.samples_per_epoch)
    starts = np.concatenate(([0], np.cumsum(lengths))).tolist()
    for epoch in range(2):
        indices = range(epoch * count, (epoch + 1) * count)
        assert labels_of(samples, indices) == every_label_of(lengths)
        inputs = Counter(int(at) for index in indices for at in samples.place(index).positions)
        for number, length in enumerate(lengths):
            if 2 <= length <= sequence_length + 1:
                own = range(starts[number], starts[number + 1])
                assert [inputs[token] for token in own] == [1] * length
                assert any(set(own) <= set(row) for row in rows(samples, indices[0], count)), "cut"
    tokens = sum(sequence_length - samples.padding(index) for index in range(count))
    assert samples.padding_share == pytest.approx(1 - tokens / (count * sequence_length))


@given(lengths=some_lengths, sequence_length=st.integers(1, 12), mask=st.booleans())
@per_example
def test_targets_documents_and_padding_of_a_sample(
    make_dataset: MakeDataset, lengths: list[int], sequence_length: int, mask: bool
) -> None:
    samples = packed(make_dataset(lengths), sequence_length, mask=mask)
    starts = set(np.cumsum([0, *lengths]).tolist())
    count = int(samples.samples_per_epoch)
    for index in range(count):
        tokens, labels = samples.sample(index)
        documents, used = samples.documents(index), sequence_length - samples.padding(index)
        assert samples.target_count(index) == (labels != IGNORE_INDEX).sum()
        assert (tokens.shape, labels.shape, documents.shape) == ((sequence_length,),) * 3
        assert tokens[used:].tolist() == [0] * (sequence_length - used)
        assert labels[used:].tolist() == [IGNORE_INDEX] * (sequence_length - used)
        assert not set(documents[used:].tolist()) & set(documents[:used].tolist())
        for token, before, document, other in zip(tokens[1:used], tokens, documents[1:], documents, strict=False):
            assert (document == other) == (token == before + 1 and int(token) not in starts)
    unmasked = labels_of(samples, range(count)) - every_label_of(lengths)
    assert max(unmasked.values(), default=0) <= 1, "no label twice"
    assert set(unmasked) <= (set() if mask else starts)


@given(lengths=some_lengths, lengths_of_samples=st.lists(st.integers(1, 12), min_size=2, max_size=3), data=st.data())
@per_example
def test_a_change_of_the_length_loses_and_repeats_nothing(
    make_dataset: MakeDataset, lengths: list[int], lengths_of_samples: list[int], data: st.DataObject
) -> None:
    samples, expected = packed(make_dataset(lengths), lengths_of_samples[0]), every_label_of(lengths)
    seen = Counter[int]()
    for length in lengths_of_samples[1:]:
        consumed = data.draw(st.integers(0, samples_left(samples, seen, expected)))
        seen += labels_of(samples, range(consumed))
        samples = samples.recut(consumed, length)
    left = samples_left(samples, seen, expected)
    assert seen + labels_of(samples, range(left)) == expected
    whole = packed(make_dataset(lengths), lengths_of_samples[-1])
    assert labels_of(samples, range(left, left + int(whole.samples_per_epoch))) == expected
    assert samples.recut_tokens == (0, 0)


def samples_left(samples: TrainingSamples, seen: Counter[int], expected: Counter[int]) -> int:
    """Return how many samples have the labels that are missing, by their number."""
    missing, index = expected.total() - seen.total(), 0
    while missing > 0:
        missing -= samples.target_count(index)
        index += 1
    return index


def test_the_order_is_this_one(make_dataset: MakeDataset) -> None:
    """A change of these numbers breaks every run that is resumed."""
    samples = packed(make_dataset(LENGTHS), seed=1234)
    assert [row[0] for row in rows(samples, 0, 12)] == [30, 22, 3, 15, 3, 22, 15, 30, 30, 22, 3, 15]
    assert rows(samples, 0, 4) == [
        [30, 31, 32, 33, 34, 35, 0, 1, 2],
        [22, 23, 24, 25, 26, 27, 28, 20, 21],
        [3, 4, 5, 6, 7, 8, 9, 10, 11],
        [15, 16, 17, 18, 19, 11, 12, 13, 14],
    ]


def test_the_first_samples_do_not_depend_on_the_length_of_the_run(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(LENGTHS * 40)
    short = rows(packed(dataset), 0, 50)
    long = TrainingSamples(dataset, (0, len(dataset)), 8, 5, requested_samples=9999, packing="best_fit")
    long.sample(700)
    assert rows(long, 0, 50) == short
    for _ in range(2):  # made, and found
        assert rows(packed(dataset, cache=tmp_path / "orders"), 0, 50) == short
    assert rows(packed(dataset, seed=6), 0, 50) != short
    assert rows(packed(dataset), int(packed(dataset).samples_per_epoch), 50) != short, "another order each epoch"
    stream = TrainingSamples(dataset, (0, len(dataset)), 8, 5)
    assert len({packed(dataset).fingerprint, packed(dataset, 9).fingerprint, stream.fingerprint}) == 3


def test_ranks_read_one_batch_together(make_dataset: MakeDataset) -> None:
    samples = packed(make_dataset([7, 4, 20] * 20))
    with BatchLoader(samples, BatchLayout(8, 8, 0, 1)) as loader:
        alone = loader.batch(8)
    parts = []
    for rank in range(4):
        with BatchLoader(samples, BatchLayout(8, 2, rank, 4)) as loader:
            parts.append(loader.batch(8))
    assert {(part.target_count, part.padding) for part in parts} == {(alone.target_count, alone.padding)}
    (whole,) = alone.micro_batches
    assert np.concatenate([part.micro_batches[0].labels for part in parts]).tolist() == whole.labels.tolist()
    assert alone.target_count == (whole.labels != IGNORE_INDEX).sum()
    assert alone.padding == sum(map(samples.padding, range(8, 16))) > 0


def test_a_mixture_is_by_tokens(make_dataset: MakeDataset) -> None:
    """Documents of 6 tokens leave a quarter of each sample empty, so that more of their samples are read."""
    parts = [packed(make_dataset([7] * 40)), packed(make_dataset([9] * 40))]
    assert [part.padding_share for part in parts] == [0.25, 0.0]
    blend = BlendedSamples(parts, [MixtureStage(0, (1, 1))])
    tokens = Counter[int]()
    for index in range(700):
        number, own = blend.locate(index)
        tokens[number] += 8 - parts[number].padding(own)
        assert blend.padding(index) == parts[number].padding(own)
        assert blend.dataset_of(index) == number
    with BatchLoader(blend, BatchLayout(8, 4, 1, 2)) as loader:
        batch = loader.batch(16)
    (micro,) = batch.micro_batches
    assert micro.datasets is not None
    assert micro.datasets.tolist() == [blend.dataset_of(index) for index in range(20, 24)]
    targets = [
        [blend.target_count(index) * (blend.dataset_of(index) == part) for index in range(16, 24)] for part in (0, 1)
    ]
    assert batch.dataset_targets == tuple(map(sum, targets))
    assert tokens[0] == pytest.approx(tokens[1], rel=0.01)
    usage = blend.planned(700)
    assert [each.epochs for each in usage] == [each.repetition for each in usage]
    assert blend.planned_padding(700) == 2 * usage[0].samples


def test_what_a_step_read(make_dataset: MakeDataset) -> None:
    lengths = [4, 3, 30]
    blend = BlendedSamples([packed(make_dataset(lengths))], [MixtureStage(0, (1,))])
    spans = list(spans_of(blend, 0, int(blend.parts[0].samples_per_epoch)))
    found = {(span.document, span.first, span.end) for span in spans}
    assert found == {(0, 0, 4), (1, 0, 3), (2, 0, 9), (2, 8, 17), (2, 16, 25), (2, 24, 30)}


def test_validation_is_packed_in_the_order_of_the_file(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(LENGTHS)
    documents = (1, len(LENGTHS))
    held = ValidationSamples(dataset, documents, 8, True, "best_fit")
    assert labels_of(held, range(len(held))).total() == every_label_of(LENGTHS[1:]).total()
    same = ValidationSamples(dataset, documents, 8, True, "best_fit", tmp_path)
    assert same.fingerprint == held.fingerprint != ValidationSamples(dataset, documents, 8, True).fingerprint
    part = held.subset(2)
    assert len(part) == 2
    assert part.fingerprint != held.fingerprint
    whole = [held.sample(index)[0].tolist() for index in range(len(held))]
    assert [part.sample(index)[0].tolist() for index in range(2)] == [whole[1], whole[3]]
    assert [part.target_count(0), part.padding(0)] == [held.target_count(1), held.padding(1)]


def test_what_packing_refuses(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([1, 1, 1])
    with pytest.raises(DataError) as error:
        packed(dataset)
    assert_names(error.value, dataset.prefix, 0, 3, "data.packing=best_fit", "data.packing=stream")
    for order, stride in (("megatron", None), ("prefix_stable", 4)):
        with pytest.raises(ConfigError) as refused:
            TrainingSamples(make_dataset([9, 9]), (0, 2), 8, 1, order, 10, stride=stride, packing="best_fit")  # type: ignore[arg-type]
        assert_names(refused.value, "data.packing=best_fit")


def test_padding_is_reported(make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset([7] * 300)
    assert expected_padding(dataset.sequence_lengths, 8) == packed(dataset).padding_share == 0.25
    assert_names(describe(dataset.prefix, None, [8])["best-fit packing"], 8, "25.00%", "0.0%")
    monkeypatch.setattr(packing_module, "WINDOW_PIECES", 50)
    assert expected_padding(dataset.sequence_lengths, 8) == 0.25
