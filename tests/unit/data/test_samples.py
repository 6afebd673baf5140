"""Sample orders: prefix-stable, complete, equal to Megatron-LM's where that is asked for."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.sampling import sample_order
from megalm.data.sampling.sample_order import DocumentTable, stride_warning, whole_windows
from megalm.data.sampling.samples import IGNORE_INDEX, TrainingSamples, ValidationSamples, split_documents
from megalm.errors import ConfigError, DataError
from tests.messages import assert_names

MakeDataset = Callable[[Sequence[int]], IndexedDataset]
LENGTHS = [3, 5, 2, 7]  # of the golden vectors
per_example = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
some_lengths = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) >= 2)


def stream_by_hand(dataset_lengths: list[int], documents: np.ndarray) -> list[int]:
    """Tokens of the documents one after another, for datasets whose tokens are 0, 1, 2, ..."""
    starts = np.concatenate(([0], np.cumsum(dataset_lengths)))
    return [token for document in documents for token in range(starts[document], starts[document + 1])]


@pytest.mark.parametrize(
    ("requested", "documents", "samples", "shuffle"),
    [
        (4, [0, 1, 2, 3], [[0, 0], [1, 1], [2, 0], [3, 2], [3, 6]], [1, 2, 3, 0]),
        (
            9,
            [2, 1, 2, 0, 0, 1, 3, 3, 0, 2, 1, 3],
            [[0, 0], [1, 2], [2, 1], [4, 0], [5, 1], [6, 0], [6, 4], [7, 1], [7, 5], [8, 2], [10, 1], [11, 0], [11, 4]],
            [7, 5, 6, 0, 4, 3, 2, 1, 9, 11, 8, 10],
        ),
    ],
)
def test_megatron_golden_vectors(
    make_dataset: MakeDataset, requested: int, documents: list[int], samples: list[list[int]], shuffle: list[int]
) -> None:
    dataset = make_dataset(LENGTHS)
    index, order = sample_order.build(np.arange(4, dtype=np.int32), 17, 4, requested, seed=1234)
    assert index.tolist() == documents
    assert order.tolist() == shuffle
    entries, offsets = DocumentTable(dataset, index).find(np.arange(len(shuffle) + 1) * 4)
    assert np.stack([entries, offsets], axis=1).tolist() == samples
    training = TrainingSamples(dataset, (0, 4), 4, seed=1234, order="megatron", requested_samples=requested)
    stream = stream_by_hand(LENGTHS, index)
    for number, place in enumerate(shuffle):
        tokens, labels = training.sample(number)
        assert [*tokens.tolist(), labels[-1]] == stream[4 * place : 4 * place + 5]
    with pytest.raises(DataError) as error:
        training.sample(len(shuffle))
    assert_names(error.value, "data.order=megatron", len(shuffle))


@given(tokens=st.integers(2, 500), length=st.integers(1, 60), requested=st.integers(1, 300))
def test_megatron_epochs_are_the_fewest(tokens: int, length: int, requested: int) -> None:
    epochs = sample_order.count_epochs(requested, tokens, length)
    assert sample_order.count_samples(epochs, tokens, length) >= requested
    assert epochs == 1 or sample_order.count_samples(epochs - 1, tokens, length) < requested


def test_megatron_needs_a_number_of_samples(make_dataset: MakeDataset) -> None:
    with pytest.raises(ConfigError, match=r"data\.order=megatron"):
        TrainingSamples(make_dataset(LENGTHS), (0, 4), 4, seed=1, order="megatron")


@given(lengths=some_lengths, sequence_length=st.integers(1, 15), seed=st.integers(0, 2**40))
@per_example
def test_every_token_is_a_label_once_an_epoch(
    make_dataset: MakeDataset, lengths: list[int], sequence_length: int, seed: int
) -> None:
    """Over a whole number of epochs that ends at a sample's end, all tokens come equally often."""
    total = sum(lengths)
    training = TrainingSamples(make_dataset(lengths), (0, len(lengths)), sequence_length, seed)
    epochs = sequence_length  # then samples and epochs end together
    counts = np.zeros(total + 1, dtype=np.int64)
    inputs = np.zeros(total, dtype=np.int64)
    for index in range(epochs * total // sequence_length):
        tokens, labels = training.sample(index)
        np.add.at(inputs, tokens, 1)
        np.add.at(counts, labels, 1)
    assert inputs.tolist() == [epochs] * total
    # The stream's very first token is no label; the first of the next epoch is one.
    assert counts.sum() == epochs * total
    assert np.abs(counts[:total] - epochs).sum() <= 2


@given(lengths=some_lengths, sequence_length=st.integers(1, 15), seed=st.integers(0, 2**33))
@per_example
def test_samples_are_windows_of_one_stream(
    make_dataset: MakeDataset, lengths: list[int], sequence_length: int, seed: int
) -> None:
    """Each one ends with the token that another starts with; only the ends of the whole stream are left over."""
    total = sum(lengths)
    training = TrainingSamples(make_dataset(lengths), (0, len(lengths)), sequence_length, seed)
    count = math.ceil(3 * total / sequence_length)  # all that start in the first three epochs
    seen = [training.sample(index) for index in range(count)]
    for tokens, labels in seen:
        assert (tokens.dtype, labels.dtype, tokens.shape) == (np.int64, np.int64, (sequence_length,))
        assert tokens[1:].tolist() == labels[:-1].tolist()
    firsts = Counter(int(tokens[0]) for tokens, _ in seen)
    lasts = Counter(int(labels[-1]) for _, labels in seen)
    assert (firsts - lasts).total() <= 1
    assert (lasts - firsts).total() <= 1
    assert training.samples_per_epoch == total / sequence_length


@given(lengths=some_lengths, sequence_length=st.integers(1, 9), seed=st.integers(0, 99), start=st.integers(0, 60))
@per_example
def test_the_order_is_a_pure_function_of_the_seed(
    make_dataset: MakeDataset, lengths: list[int], sequence_length: int, seed: int, start: int
) -> None:
    """Asking for more, from elsewhere, or again after other samples, gives the same."""
    dataset = make_dataset(lengths)
    short = TrainingSamples(dataset, (0, len(lengths)), sequence_length, seed)
    long = TrainingSamples(dataset, (0, len(lengths)), sequence_length, seed, requested_samples=10_000)
    long.sample(500)
    for index in range(start, start + 5):
        assert short.sample(index)[0].tolist() == long.sample(index)[0].tolist()
    assert short.fingerprint == long.fingerprint


def test_the_order_is_this_one(make_dataset: MakeDataset) -> None:
    """A change of these numbers breaks every run that is resumed."""
    training = TrainingSamples(make_dataset(LENGTHS), (0, 4), 4, seed=1234)
    assert [training.sample(index)[0].tolist() for index in range(6)] == [
        [8, 9, 0, 1],
        [2, 0, 1, 2],
        [4, 5, 6, 7],
        [14, 15, 16, 3],
        [10, 11, 12, 13],
        [3, 4, 5, 6],
    ]


def test_stride_gives_overlapping_windows(make_dataset: MakeDataset) -> None:
    lengths = [13, 7, 20]
    training = TrainingSamples(make_dataset(lengths), (0, 3), 8, seed=3, stride=2)
    assert training.samples_per_epoch == 20
    seen = Counter(int(token) for index in range(20) for token in training.sample(index)[0])
    # Windows run on into the next epoch, so that the first tokens of this one are seen a few times less.
    assert sum(seen.values()) == 20 * 8
    assert max(seen.values()) <= 2 * 8 // 2
    starts = sorted(int(training.place(index).positions[0]) for index in range(20))
    assert len(set(starts)) == 20
    whole = TrainingSamples(make_dataset(lengths), (0, 3), 8, seed=3)
    same = TrainingSamples(make_dataset(lengths), (0, 3), 8, seed=3, stride=8)
    assert same.fingerprint == whole.fingerprint != training.fingerprint
    for stride, order in ((0, "prefix_stable"), (9, "prefix_stable"), (4, "megatron")):
        with pytest.raises(ConfigError, match=f"data.stride={stride}"):
            TrainingSamples(make_dataset(lengths), (0, 3), 8, 3, order, 10, stride=stride)  # type: ignore[arg-type]


def test_how_often_tokens_are_seen() -> None:
    assert [whole_windows(991_386, 1024, stride) for stride in (1, 1024)] == [990_362, 968]
    assert whole_windows(5, 5, 1) == 0
    assert stride_warning(991_386, 1024, 1024, 10) is None
    warning = stride_warning(991_386, 1024, 1, 990_362)
    assert_names(warning, "data.stride=1", "data.sequence_length=1024", "991,386")
    assert_names(warning, "990,362", 968)
    assert warning is not None
    assert warning.count("1,022.9") == 2, "an epoch of so many samples is this run"


def test_cached_orders_are_the_same_and_mend_themselves(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset([10] * 100)
    plain = TrainingSamples(dataset, (3, 90), 7, seed=5)
    expected = [plain.sample(index)[0].tolist() for index in range(0, 300, 11)]

    def cached() -> list[list[int]]:
        samples = TrainingSamples(dataset, (3, 90), 7, seed=5, cache=tmp_path / "orders")
        return [samples.sample(index)[0].tolist() for index in range(0, 300, 11)]

    assert cached() == expected
    files = sorted((tmp_path / "orders").rglob("*.npy"))
    assert files
    times = [file.stat().st_mtime_ns for file in files]
    assert cached() == expected
    assert [file.stat().st_mtime_ns for file in files] == times
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    assert cached() == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: cached(), range(8))) == [expected] * 8


def test_permutations_are_numpy_s_own() -> None:
    """Half the memory, the same numbers: a change breaks every run that is resumed."""
    for count in (1, 2, 1000):
        ours = sample_order.permutation(np.random.RandomState(3), count)
        assert ours.tolist() == np.random.RandomState(3).permutation(count).tolist()


def test_epochs_and_seeds_differ(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([10] * 100)
    one, two = (TrainingSamples(dataset, (0, 100), 10, seed) for seed in (1, 2))
    first, second = ([one.sample(index)[0][0] for index in range(start, start + 100)] for start in (0, 100))
    assert sorted(first) == sorted(second) == list(range(0, 1000, 10))
    assert first != second
    assert first != [two.sample(index)[0][0] for index in range(100)]
    assert first != sorted(first)
    assert one.fingerprint != two.fingerprint


def test_only_documents_of_the_range(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([10] * 10)
    training = TrainingSamples(dataset, (2, 5), 7, seed=0)
    seen = {int(token) for index in range(30) for token in training.sample(index)[0]}
    assert seen == set(range(20, 50))
    assert training.tokens_per_epoch == 30


@pytest.mark.parametrize("order", ["prefix_stable", "megatron"])
def test_document_mask(make_dataset: MakeDataset, order: str) -> None:
    """Tokens are their place in the file, so a label that does not follow its input starts a document."""
    lengths = [4, 1, 6, 0, 9, 3]
    dataset = make_dataset(lengths)
    starts = {0, 4, 5, 11, 20}
    made = {"document_range": (0, 6), "sequence_length": 8, "seed": 5, "order": order, "requested_samples": 12}
    plain = TrainingSamples(dataset, **made)  # type: ignore[arg-type]
    masked = TrainingSamples(dataset, **made, document_mask=True)  # type: ignore[arg-type]
    masked_labels = 0
    for index in range(12):
        (tokens, labels), (same_tokens, masked_row) = plain.sample(index), masked.sample(index)
        assert tokens.tolist() == same_tokens.tolist()
        expected = [IGNORE_INDEX if int(label) in starts else int(label) for label in labels]
        assert masked_row.tolist() == expected
        numbers = masked.documents(index)
        assert numbers.dtype == np.int32
        begins = [number != before for before, number in itertools.pairwise([0, *numbers])]
        assert begins[1:] == [int(token) in starts for token in tokens[1:]]
        assert masked.target_count(index) == sum(label != IGNORE_INDEX for label in expected)
        assert plain.target_count(index) == 8
        masked_labels += expected.count(IGNORE_INDEX)
    assert masked_labels > 10


def test_one_document_over_and_over_still_has_boundaries(make_dataset: MakeDataset) -> None:
    masked = TrainingSamples(make_dataset([5]), (0, 1), 12, seed=0, document_mask=True)
    tokens, labels = masked.sample(0)
    assert tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert labels.tolist() == [1, 2, 3, 4, IGNORE_INDEX, 1, 2, 3, 4, IGNORE_INDEX, 1, 2]
    assert masked.documents(0).tolist() == [0] * 5 + [1] * 5 + [2] * 2


@given(lengths=some_lengths, sequence_length=st.integers(1, 15))
@per_example
def test_validation_windows_cover_the_range_once(
    make_dataset: MakeDataset, lengths: list[int], sequence_length: int
) -> None:
    validation = ValidationSamples(make_dataset(lengths), (0, len(lengths)), sequence_length)
    rows = [validation.sample(index) for index in range(len(validation))]
    labels = np.concatenate([row for _, row in rows])
    assert labels[labels != IGNORE_INDEX].tolist() == list(range(1, sum(lengths)))
    for index, (tokens, row) in enumerate(rows):
        targets = int((row != IGNORE_INDEX).sum())
        assert tokens[:targets].tolist() == (row[:targets] - 1).tolist()
        assert tokens[targets:].tolist() == [0] * (sequence_length - targets)
        assert validation.target_count(index) == targets > 0


def test_validation_document_mask(make_dataset: MakeDataset) -> None:
    validation = ValidationSamples(make_dataset([4, 3, 4]), (0, 2), 4, document_mask=True)
    assert [validation.sample(index)[1].tolist() for index in range(2)] == [
        [1, 2, 3, IGNORE_INDEX],
        [5, 6, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert [validation.documents(index).tolist() for index in range(2)] == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert [validation.target_count(index) for index in range(2)] == [3, 2]


def test_validation_subset_is_evenly_spaced(make_dataset: MakeDataset) -> None:
    validation = ValidationSamples(make_dataset([101]), (0, 1), 10)
    assert len(validation) == 10
    starts = [int(validation.subset(5).sample(index)[0][0]) for index in range(5)]
    assert starts == [10, 30, 50, 70, 90]
    assert len(validation.subset(3)) == 3
    assert validation.subset(99) is validation
    assert validation.subset(5).fingerprint != validation.fingerprint


def test_split_documents() -> None:
    assert split_documents(804, (95, 5)) == [(0, 764), (764, 804)]
    assert split_documents(10, (8, 1, 1)) == [(0, 8), (8, 9), (9, 10)]
    assert split_documents(3, (1, 0)) == [(0, 3), (3, 3)]
    assert split_documents(5, (1, 1)) == [(0, 2), (2, 5)]  # Python and Megatron-LM round half to even
    for wrong in ((), (0, 0), (2, -1)):
        with pytest.raises(ConfigError) as error:
            split_documents(10, wrong)
        assert_names(error.value, "data.split", list(wrong))


def test_too_few_tokens(make_dataset: MakeDataset) -> None:
    dataset = make_dataset([1, 0, 5])
    with pytest.raises(DataError) as error:
        TrainingSamples(dataset, (0, 2), 4, seed=0)
    assert_names(error.value, dataset.prefix, 0, 2, 1, "data.split")
    with pytest.raises(DataError) as error:
        ValidationSamples(dataset, (1, 2), 4)
    assert_names(error.value, dataset.prefix, 1, 2, 0, "data.split")


def test_random_reads_are_announced(make_dataset: MakeDataset) -> None:
    """Else the system reads megabytes around each sample: 6 ms instead of 0.03 ms, measured."""
    dataset = make_dataset([5000] * 3)

    def flags() -> str:
        maps = Path("/proc/self/smaps").read_text().split(f"{dataset.prefix}.bin\n")[1]
        return maps.split("VmFlags:")[1].split("\n")[0]

    assert "rr" not in flags().split()
    TrainingSamples(dataset, (0, 3), 8, seed=1)
    assert "rr" in flags().split()
