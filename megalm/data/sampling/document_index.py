"""A list of documents read one after the other, as one stream of tokens.

D documents in the list, T tokens in all, n tokens asked for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset


class DocumentTable:
    """Finds positions of the stream in the dataset's file: a binary search, for all tokens at once.

    Args:
        documents: [D] sequences of the dataset, in the order of reading; one may come several times.
        starts: [D + 1] what `document_starts` gives for them, where it is at hand.
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
        """(place in `documents`, token inside that document) of stream positions; empty documents hold none."""
        entry = np.asarray(np.searchsorted(self.starts, position, side="right") - 1)
        return entry, np.asarray(position - self.starts[entry])

    def locate(self, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where stream positions [first, first + count) lie: in the dataset's tokens [n], and in `documents` [n]."""
        assert 0 <= first <= first + count <= self.token_count
        entry, offset = self.find(np.arange(first, first + count, dtype=np.int64))
        base = self._dataset.sequence_pointers[self.documents[entry]] // self._dataset.dtype.itemsize
        return base + offset, entry.astype(np.int64)


def document_starts(dataset: IndexedDataset, documents: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """[D + 1] stream position of each document's first token, and of the end."""
    starts = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum(dataset.sequence_lengths[documents], dtype=np.int64, out=starts[1:])
    return starts
