"""A list of documents as one stream of tokens.

D: documents in the list, T: tokens in total, n: requested tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset


class DocumentTable:
    """Maps stream positions to the dataset's tokens with one binary search for all tokens.

    Args:
        documents: [D] sequences of the dataset, in reading order; a sequence can occur several times.
        starts: [D + 1] result of `document_starts` for them, if already computed.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: npt.NDArray[np.integer],
        starts: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._dataset, self.documents = dataset, documents
        if len(dataset) < 2**31 and documents.dtype != np.int32:
            self.documents = documents.astype(np.int32)
        # Stream position of each document's first token, and of the end: [D + 1].
        self.starts = document_starts(dataset, documents) if starts is None else starts

    @property
    def token_count(self) -> int:
        return int(self.starts[-1])

    def find(self, position: npt.NDArray[np.int64] | int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Return (index in `documents`, token inside that document) of stream positions; skips empty documents."""
        entry = np.asarray(np.searchsorted(self.starts, position, side="right") - 1)
        return entry, np.asarray(position - self.starts[entry])

    def locate(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Map stream positions [first, first + count) to places in the dataset's tokens [n] and in `documents` [n]."""
        assert 0 <= first <= first + count <= self.token_count
        entry, offset = self.find(np.arange(first, first + count, dtype=np.int64))
        base = self._dataset.sequence_pointers[self.documents[entry]] // self._dataset.dtype.itemsize
        return base + offset, entry.astype(np.int64)


def document_starts(dataset: IndexedDataset, documents: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return [D + 1] the stream position of each document's first token, and of the end."""
    starts = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum(dataset.sequence_lengths[documents], dtype=np.int64, out=starts[1:])
    return starts
