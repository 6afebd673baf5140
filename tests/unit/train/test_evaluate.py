"""Validation sets: each has its own mean, the total counts every token alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.writer import IndexedDatasetWriter
from megalm.data.sampling.batch_loader import BatchLayout, MicroBatch, ValidationLoader
from megalm.data.sampling.samples import IGNORE_INDEX, ValidationSamples
from megalm.train.evaluator import Evaluator

LAYOUT = BatchLayout(4, 2, 0, 1)


class Engine:
    """Every target costs its own number in nats, and a tenth with the average of the weights."""

    def __init__(self) -> None:
        self.factor = 1.0

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        return self.factor * float(sum(batch.labels[batch.labels != IGNORE_INDEX].sum() for batch in micro_batches))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        self.factor = 0.1
        yield
        self.factor = 1.0


class Alone:
    """`ranks` that all read the same."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks

    def sum(self, values: Sequence[float]) -> list[float]:
        return [value * self._ranks for value in values]


@pytest.fixture
def loader(tmp_path: Path) -> Callable[[str, Sequence[int]], ValidationLoader]:
    def make(name: str, tokens: Sequence[int]) -> ValidationLoader:
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.append(tokens)
        return ValidationLoader(ValidationSamples(IndexedDataset(tmp_path / name), (0, 1), 8), LAYOUT)

    return make


def evaluator(sets: dict[str, tuple[ValidationLoader, ValidationLoader]], ranks: int = 1) -> Evaluator:
    return Evaluator(sets, np.arange(10, dtype=np.int32), Alone(ranks), replicas=ranks)  # type: ignore[arg-type]


def test_one_set_is_the_total(loader: Callable[[str, Sequence[int]], ValidationLoader]) -> None:
    only = loader("a", [0, 1, 2, 3])
    found = evaluator({"validation": (only, only)}).evaluate(Engine(), whole=True)  # type: ignore[arg-type]
    assert found is not None
    assert (found.dataset, found.loss, found.targets, found.parts) == ("validation", 2.0, 3, ())
    assert evaluator({}).evaluate(Engine(), whole=True) is None  # type: ignore[arg-type]


def test_the_average_has_losses_over_the_same_samples(loader: Callable[[str, Sequence[int]], ValidationLoader]) -> None:
    sets = {name: (loader(name, tokens),) * 2 for name, tokens in (("a", [0, 1, 2, 3]), ("b", [0, 8]))}
    engine, plain = Engine(), evaluator(sets)
    found = plain.evaluate(engine, whole=True)
    both = replace(plain, averaged_weights=engine.averaged_weights).evaluate(engine, whole=True)
    assert found is not None
    assert both is not None
    assert (found.ema_loss, both.ema_loss) == (None, pytest.approx(found.loss / 10))
    assert [part.ema_loss for part in both.parts] == pytest.approx([part.loss / 10 for part in found.parts])
    parts = tuple(replace(part, ema_loss=None) for part in both.parts)
    assert replace(both, ema_loss=None, parts=parts) == found


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_total_is_weighted_by_tokens(loader: Callable[[str, Sequence[int]], ValidationLoader], ranks: int) -> None:
    few, many, part = loader("few", [0, 9]), loader("many", [0] + [1] * 30), loader("part", [0] + [2] * 4)
    sets = {"few": (few, few), "many": (part, many)}
    found = evaluator(sets, ranks).evaluate(Engine(), whole=True)  # type: ignore[arg-type]
    assert found is not None
    assert [(part.dataset, part.loss, part.targets) for part in found.parts] == [("few", 9.0, 1), ("many", 1.0, 30)]
    assert (found.dataset, found.targets) == ("validation", 31)
    assert found.loss == pytest.approx((9 + 30) / 31)
    # A token's bytes are its number here, and so are its nats.
    assert found.bits_per_byte == found.parts[0].bits_per_byte == pytest.approx(1 / math.log(2))
    while_training = evaluator(sets, ranks).evaluate(Engine(), whole=False)  # type: ignore[arg-type]
    assert while_training is not None
    assert [part.targets for part in while_training.parts] == [1, 4]


def test_the_standard_error_is_that_of_the_batches(loader: Callable[[str, Sequence[int]], ValidationLoader]) -> None:
    # Samples of 8 tokens in batches of 4: two batches of 32 targets, whose means are 1 and 3.
    two = loader("two", [0] + [1] * 32 + [3] * 32)
    found = evaluator({"validation": (two, two)}).evaluate(Engine(), whole=True)  # type: ignore[arg-type]
    assert found is not None
    assert (found.loss, found.targets) == (2.0, 64)
    assert found.stderr == pytest.approx(math.sqrt(2 * (32**2 + 32**2)) / 64)  # that of the mean of 1 and 3: 1
    one = loader("one", [0] + [1] * 8)
    alone = evaluator({"a": (two, two), "b": (one, one)}).evaluate(Engine(), whole=True)  # type: ignore[arg-type]
    assert alone is not None
    assert (alone.stderr, alone.parts[1].stderr) == (None, None)  # of one batch nothing is known
    both = evaluator({"a": (two, two), "b": (two, two)}).evaluate(Engine(), whole=True)  # type: ignore[arg-type]
    assert both is not None
    assert both.stderr == pytest.approx(found.stderr / math.sqrt(2))
