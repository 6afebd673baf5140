"""Token sequences of any length, as batches for evaluation: of like length together, so that little is padded.

Shapes: n tokens of a sequence, B sequences of a batch, T the longest of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.data.sampling.batch_loader import GlobalBatch, MicroBatch
from megalm.data.sampling.samples import IGNORE_INDEX


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens of which the later ones are to be predicted.

    Attributes:
        tokens: [n], n at least 2; the last one is only predicted.
        first: the first token, by its place, whose loss counts; at least 1.
    """

    tokens: npt.NDArray[np.integer]
    first: int

    @property
    def targets(self) -> int:
        return len(self.tokens) - self.first


class SequenceBatches:
    """The sequences in batches, the longest first: what does not fit the memory fails at once."""

    def __init__(self, sequences: Sequence[ScoredSequence], batch_size: int) -> None:
        self._sequences, self._size = sequences, batch_size
        self._order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))

    def __len__(self) -> int:
        return (len(self._order) + self._size - 1) // self._size

    def __iter__(self) -> Iterator[GlobalBatch]:
        return map(self.batch, range(len(self)))

    def indices(self, index: int) -> list[int]:
        """Which of the sequences batch `index` holds, row by row."""
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


def evenly(count: int, most: int | None) -> list[int]:
    """`most` of `count` places, evenly spaced, always the same; all of them where there are no more."""
    if most is None or most >= count:
        return list(range(count))
    return [(2 * place + 1) * count // (2 * most) for place in range(most)]
