"""Checks of a dataset whose tokenizer is not recorded, because another toolkit built it: by looking at its tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset, bin_path
from megalm.errors import DataError

# Up to this many tokens are read; of a larger dataset, evenly spaced probes that together have as many.
SCANNED_TOKENS = 1 << 24
PROBE_TOKENS = 1 << 16
SEEN_DOCUMENTS = 4096


def check_foreign_dataset(
    dataset: IndexedDataset, eod_id: int | None, append_eod: bool | None, bos_id: int | None = None
) -> None:
    """Check the range of the tokens, and how documents end and begin.

    Args:
        eod_id: the end-of-document token; needed only if `append_eod` is not None.
        append_eod: whether documents must end with it; None: either.
        bos_id: the token that documents must begin with; None: any.

    Raises:
        DataError: a token is outside `dataset.vocab_size`, or documents end or begin otherwise.
    """
    total = len(dataset.tokens)
    probes = -(-min(total, SCANNED_TOKENS) // PROBE_TOKENS)
    for start in np.linspace(0, max(0, total - PROBE_TOKENS), probes, dtype=np.int64).tolist():
        dataset.read(range(start, min(start + PROBE_TOKENS, total)))
    if append_eod is not None:
        ended, count = ends_with(dataset, eod_id)
        if (ended < count) if append_eod else (2 * ended > count):
            raise DataError(
                f"{bin_path(dataset.prefix)}: of {count:,} documents looked at, {ended:,} end with the "
                f"end-of-document token {eod_id}, unlike data.append_eod={str(append_eod).lower()}; "
                "change the key, or build the dataset again"
            )
    if bos_id is not None:
        begun, count = begins_with(dataset, bos_id)
        if begun < count:
            raise DataError(
                f"{bin_path(dataset.prefix)}: of {count:,} documents looked at, {begun:,} begin with the token "
                f"{bos_id} of data.bos_token or of the run's other datasets; change the key, or build the dataset again"
            )


def ends_with(dataset: IndexedDataset, token: int | None) -> tuple[int, int]:
    """Return how many of the documents looked at end with the token, and the number of these documents."""
    begins, ends = _looked_at(dataset)
    return int(np.count_nonzero(dataset.tokens[ends - 1] == token)), len(begins)


def begins_with(dataset: IndexedDataset, token: int | None) -> tuple[int, int]:
    """Return how many of the documents looked at begin with the token, and the number of these documents."""
    begins, _ = _looked_at(dataset)
    return int(np.count_nonzero(dataset.tokens[begins] == token)), len(begins)


def _looked_at(dataset: IndexedDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the [first, end) tokens of some documents, without those whose first or last sequence is empty."""
    count = min(dataset.document_count, SEEN_DOCUMENTS)
    documents = np.linspace(0, max(0, dataset.document_count - 1), count, dtype=np.int64)
    begins, ends = dataset.document_index[documents], dataset.document_index[documents + 1]
    first, last = begins[ends > begins], ends[ends > begins] - 1  # sequences of each document that has one
    lengths, size = dataset.sequence_lengths, dataset.dtype.itemsize
    whole = (lengths[first] > 0) & (lengths[last] > 0)
    first, last = first[whole], last[whole]
    return dataset.sequence_pointers[first] // size, dataset.sequence_pointers[last] // size + lengths[last]
