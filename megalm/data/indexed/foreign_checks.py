"""Checks of a dataset whose tokenizer is not recorded, because another toolkit built it: by looking at its tokens."""

from __future__ import annotations

import numpy as np

from megalm.data.indexed.dataset import IndexedDataset, bin_path
from megalm.errors import DataError

# Up to this many tokens are read; of a larger dataset, evenly spaced probes that together have as many.
SCANNED_TOKENS = 1 << 24
PROBE_TOKENS = 1 << 16
SEEN_DOCUMENTS = 4096


def check_foreign_dataset(dataset: IndexedDataset, eod_id: int | None, append_eod: bool | None) -> None:
    """Check the range of the tokens and the ends of the documents.

    Args:
        eod_id: the end-of-document token; needed only if `append_eod` is not None.
        append_eod: whether documents must end with it; None: either.

    Raises:
        DataError: a token is outside `dataset.vocab_size`, or documents end otherwise.
    """
    total = len(dataset.tokens)
    probes = -(-min(total, SCANNED_TOKENS) // PROBE_TOKENS)
    for start in np.linspace(0, max(0, total - PROBE_TOKENS), probes, dtype=np.int64).tolist():
        dataset.read(range(start, min(start + PROBE_TOKENS, total)))
    if append_eod is not None:
        _check_ends(dataset, eod_id, append_eod)


def _check_ends(dataset: IndexedDataset, eod_id: int | None, append_eod: bool) -> None:
    count = min(dataset.document_count, SEEN_DOCUMENTS)
    documents = np.linspace(0, max(0, dataset.document_count - 1), count, dtype=np.int64)
    begins, ends = dataset.document_index[documents], dataset.document_index[documents + 1]
    last = ends[ends > begins] - 1  # the last sequence of each document that has one
    last = last[dataset.sequence_lengths[last] > 0]
    positions = dataset.sequence_pointers[last] // dataset.dtype.itemsize + dataset.sequence_lengths[last] - 1
    ended = int(np.count_nonzero(dataset.tokens[positions] == eod_id))
    if (ended < len(last)) if append_eod else (2 * ended > len(last)):
        raise DataError(
            f"{bin_path(dataset.prefix)}: of {len(last):,} documents looked at, {ended:,} end with the "
            f"end-of-document token {eod_id}, unlike data.append_eod={str(append_eod).lower()}; "
            "change the key, or build the dataset again"
        )
