"""What a training step reads: the documents of its samples, by file, line and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.data.samples import TrainingSamples
from megalm.data.sources import Source, Sources


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one document inside a sample.

    Attributes:
        sample: number of the sample, as the loader counts them.
        document, source: which document of the dataset, and where it came from (None: nobody noted it).
        first, end: which of its tokens.
        tokens: their ids.
    """

    sample: int
    document: int
    source: Source | None
    first: int
    end: int
    tokens: tuple[int, ...]


def pieces_of(samples: TrainingSamples, first_sample: int, count: int) -> Iterator[Piece]:
    """What samples [first_sample, first_sample + count) are made of, in their order; labels' last token included.

    Step N of a run with a global batch of B reads the samples from (N - 1) * B on.
    """
    dataset = samples.dataset
    sources = Sources(dataset.prefix, dataset.document_count)
    starts = dataset.sequence_pointers // dataset.dtype.itemsize
    for sample in range(first_sample, first_sample + count):
        positions = samples.place(sample).positions
        sequences = np.searchsorted(starts, positions, side="right") - 1
        # Empty sequences start where the next one does: the last that starts there holds the token.
        breaks = np.flatnonzero((np.diff(sequences) != 0) | (np.diff(positions) != 1)) + 1
        for run in np.split(np.arange(len(positions)), breaks):
            sequence = int(sequences[run[0]])
            document = int(np.searchsorted(dataset.document_index, sequence, side="right")) - 1
            begin = int(starts[dataset.document_index[document]])
            where = positions[run]
            yield Piece(
                sample=sample,
                document=document,
                source=sources[document],
                first=int(where[0]) - begin,
                end=int(where[-1]) - begin + 1,
                tokens=tuple(map(int, dataset.tokens[where])),
            )
