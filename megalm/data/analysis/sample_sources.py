"""Trace the samples of a training step to their documents, by file, line and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalm.data.indexed.dataset import IndexedDataset
from megalm.data.indexed.metadata import DocumentSource, DocumentSources
from megalm.data.sampling.mixture import BlendedSamples
from megalm.data.sampling.sample_order import Int64s


@dataclass(frozen=True)
class TokenSpan:
    """A run of tokens of one document inside a sample.

    Attributes:
        sample: number of the sample in the loader's order.
        prefix: the dataset.
        document, source: number of the document in the dataset, and its origin (None if not recorded).
        first, end: range of the document's tokens.
        tokens: their ids.
        trained: of a dataset of conversations, whether each of them is trained.
    """

    sample: int
    prefix: str
    document: int
    source: DocumentSource | None
    first: int
    end: int
    tokens: tuple[int, ...]
    trained: tuple[bool, ...] | None


def spans_of(samples: BlendedSamples, first_sample: int, count: int) -> Iterator[TokenSpan]:
    """Yield the token spans of samples [first_sample, first_sample + count), in order; includes the last label."""
    sources = [DocumentSources(part.dataset.prefix, part.dataset.document_count) for part in samples.parts]
    starts = [part.dataset.sequence_pointers // part.dataset.dtype.itemsize for part in samples.parts]
    for sample in range(first_sample, first_sample + count):
        number, index = samples.locate(sample)
        part = samples.parts[number]
        yield from _pieces_at(part.dataset, starts[number], sources[number], part.place(index).positions, sample)


def _pieces_at(
    dataset: IndexedDataset, starts: Int64s, sources: DocumentSources, positions: Int64s, sample: int
) -> Iterator[TokenSpan]:
    """Split positions [n] in the dataset's tokens into runs inside documents; `starts` [S] are its sequence starts."""
    sequences = np.searchsorted(starts, positions, side="right") - 1
    # An empty sequence starts where the next one starts: the last of them holds the token.
    breaks = np.flatnonzero((np.diff(sequences) != 0) | (np.diff(positions) != 1)) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        sequence = int(sequences[run[0]])
        document = int(np.searchsorted(dataset.document_index, sequence, side="right")) - 1
        begin = int(starts[dataset.document_index[document]])
        where = positions[run]
        yield TokenSpan(
            sample=sample,
            prefix=dataset.prefix,
            document=document,
            source=sources[document],
            first=int(where[0]) - begin,
            end=int(where[-1]) - begin + 1,
            tokens=tuple(dataset.read(where).tolist()),
            trained=None if dataset.trained is None else tuple(dataset.trained.at(where).tolist()),
        )
