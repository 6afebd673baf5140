"""Another sequence length in the middle of an epoch: what was read is not read again, what is left is read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.mixture import BlendedSamples, MixtureStage
from megalm.data.sampling.samples import TrainingSamples
from megalm.errors import ConfigError
from tests.messages import assert_names

TOKENS = 3001
Label = tuple[int, int]  # which reading of a document it is in, and where in the file


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    lengths = [37] * 81 + [4]
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        writer.append_documents(np.arange(TOKENS), lengths)
    return IndexedDataset(tmp_path / "d")


def labels(samples: TrainingSamples, first: int, end: int) -> Counter[Label]:
    found: Counter[Label] = Counter()
    for place in map(samples.place, range(first, end)):
        found.update(zip(place.instances[1:].tolist(), place.positions[1:].tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    ("before", "after", "consumed"), [(32, 16, 40), (32, 16, 0), (16, 32, 70), (32, 20, 50), (24, 24, 9), (32, 16, 130)]
)
def test_every_token_is_a_label_once(dataset: IndexedDataset, before: int, after: int, consumed: int) -> None:
    old = TrainingSamples(dataset, (0, len(dataset)), before, seed=3)
    new = old.recut(consumed, after)
    epoch = consumed * before // TOKENS
    first = -(-epoch * TOKENS // before)
    rest = new._stream._starts.size  # type: ignore[union-attr]
    read = labels(old, first, consumed)
    again = labels(new, 0, rest)
    assert not read & again
    skipped, repeated = new.recut_tokens
    # What is skipped lies between samples that were read, or after the last one; the next epoch's first tokens are read
    # by this epoch's last sample.
    old_end = -(-(epoch + 1) * TOKENS // before) * before
    old_start = -(-epoch * TOKENS // before) * before
    next_start = -(-(epoch + 1) * TOKENS // after) * after
    assert skipped == old_end - old_start - sum(read.values()) - sum(again.values()) + max(0, next_start - old_end)
    assert repeated == max(0, old_end - next_start)
    if before % after == 0:
        assert skipped < after  # halves of what was left are all of it, up to where the epochs meet
    following = labels(new, rest, rest + TOKENS // after)
    assert len(following) >= TOKENS - 2 * after  # then a whole epoch


def test_cut_again_and_again(dataset: IndexedDataset) -> None:
    first = TrainingSamples(dataset, (0, len(dataset)), 32, seed=3)
    second = first.recut(20, 16)
    third = second.recut(31, 8)
    rest = third._stream._starts.size  # type: ignore[union-attr]
    read = labels(first, 0, 20) + labels(second, 0, 31) + labels(third, 0, rest)
    assert max(read.values()) == 1
    assert sum(read.values()) == 94 * 32 - _inside(third, 94 * 32)
    assert third.fingerprint not in (second.fingerprint, second.recut(32, 8).fingerprint)
    same = TrainingSamples(dataset, (0, len(dataset)), 32, seed=3).recut(20, 16).recut(31, 8)
    assert same.fingerprint == third.fingerprint
    assert np.array_equal(same.sample(7)[0], third.sample(7)[0])


def _inside(samples: TrainingSamples, old_end: int) -> int:
    """Tokens that were skipped before the end of the epoch's old samples."""
    next_start = -(-TOKENS // samples.sequence_length) * samples.sequence_length
    return samples.recut_tokens[0] - max(0, next_start - old_end)


def test_a_mixture_goes_on_with_the_rest_of_each_dataset(dataset: IndexedDataset) -> None:
    def part(first: int, end: int) -> TrainingSamples:
        return TrainingSamples(dataset, (first, end), 32, seed=3)

    old = BlendedSamples([part(0, 40), part(40, 82)], [MixtureStage(0, (3.0, 1.0)), MixtureStage(24, (1.0, 1.0))])
    counts = [seen.samples for seen in old.consumed(40)]
    assert counts == [26, 14]
    new = old.recut(40, 16)
    assert [stage.weights for stage in new.stages] == [(1.0, 1.0)]  # those of where it stood
    for number, (before, after) in enumerate(zip(old.parts, new.parts, strict=True)):
        rest = after._stream._starts.size  # type: ignore[union-attr]
        assert not labels(before, 0, counts[number]) & labels(after, 0, rest)
        assert after.recut_tokens == before.recut(counts[number], 16).recut_tokens
    assert new.recut_tokens == tuple(sum(part.recut_tokens[index] for part in new.parts) for index in (0, 1))
    assert [new.locate(index)[0] for index in range(4)] == [0, 1, 0, 1]


def test_it_is_shuffled(dataset: IndexedDataset) -> None:
    new = TrainingSamples(dataset, (0, len(dataset)), 32, seed=3).recut(20, 16)
    starts = new._stream._starts  # type: ignore[union-attr]
    assert np.abs(np.diff(starts)).mean() > 10 * 16


@pytest.mark.parametrize("options", [{"order": "megatron", "requested_samples": 200}, {"stride": 8}])
def test_what_cannot_be_cut_anew_is_refused(dataset: IndexedDataset, options: dict[str, object]) -> None:
    samples = TrainingSamples(dataset, (0, len(dataset)), 32, seed=3, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as error:
        samples.recut(10, 16)
    assert_names(error.value, "data.sequence_length", 16, 32, "resume.allow=[order]")
