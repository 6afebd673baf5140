"""What a dataset's tokens amount to, in one pass over PREFIX.bin.

V size of the vocabulary, N tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megalm.data.indexed import IndexedDataset, bin_path
from megalm.errors import DataError

CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenSummary:
    """`unigram_entropy` in nats per token: the loss of a model that knows how frequent each token is, no more."""

    tokens: int
    largest_token: int  # -1 where there are none
    distinct_tokens: int
    unigram_entropy: float
    sha256: str  # of PREFIX.bin


def summarise(dataset: IndexedDataset, vocab_size: int | None = None) -> TokenSummary:
    """Count and hash all tokens.

    Raises:
        DataError: a token outside [0, vocab_size), which a model would fail on, or a negative one.
    """
    digest = hashlib.sha256()
    counts: npt.NDArray[np.int64] = np.zeros(vocab_size or 0, dtype=np.int64)
    for start in range(0, len(dataset.tokens), CHUNK_TOKENS):
        chunk = dataset.tokens[start : start + CHUNK_TOKENS]
        digest.update(chunk.data)
        if chunk.min() < 0 or (vocab_size is not None and chunk.max() >= vocab_size):
            wrong = chunk.min() if chunk.min() < 0 else chunk.max()
            raise DataError(
                f"{bin_path(dataset.prefix)}: holds token {wrong}, outside the vocabulary of {vocab_size}; "
                "the dataset was built with another tokenizer, or is damaged"
            )
        found = np.bincount(chunk.astype(np.int64), minlength=len(counts)).astype(np.int64)
        found[: len(counts)] += counts
        counts = found
    seen = counts[counts > 0]
    shares = seen / max(1, len(dataset.tokens))
    return TokenSummary(
        tokens=len(dataset.tokens),
        largest_token=int(np.flatnonzero(counts)[-1]) if len(seen) else -1,
        distinct_tokens=len(seen),
        unigram_entropy=float(-(shares * np.log(shares)).sum()) if len(seen) else 0.0,
        sha256=digest.hexdigest(),
    )
