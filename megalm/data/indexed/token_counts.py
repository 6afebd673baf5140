"""Count and hash a dataset's tokens in one pass over PREFIX.bin.

V: vocabulary size, N: tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import IndexedDataset, bin_path
from megalm.errors import DataError

Tell = Callable[[int], None]  # called with the number of tokens just read
CHUNK_TOKENS = 1 << 20  # small enough that a piece and its 64-bit copy stay in cache


def no_tell(tokens: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class TokenSummary:
    """`unigram_entropy` in nats per token: the loss of a model that knows token frequencies only."""

    tokens: int
    largest_token: int  # -1 if there are none
    distinct_tokens: int
    unigram_entropy: float
    sha256: str  # of PREFIX.bin


class TokenCounter:
    """Counts and hashes tokens given in pieces, in file order.

    Args:
        vocab_size: refuse tokens from this id on; None accepts all nonnegative tokens.
        name: the file's name, for errors.
        tell: called with the number of tokens of each counted piece.
    """

    def __init__(self, vocab_size: int | None, name: str | Path, tell: Tell = no_tell) -> None:
        self._vocab_size, self.name, self._tell = vocab_size, name, tell
        self._digest = hashlib.sha256()
        self.counts: npt.NDArray[np.int64] = np.zeros(vocab_size or 0, dtype=np.int64)

    def add(self, tokens: npt.NDArray[np.generic]) -> None:
        """Raises DataError for a token outside [0, vocab_size), which would fail in a model."""
        for start in range(0, len(tokens), CHUNK_TOKENS):
            chunk = tokens[start : start + CHUNK_TOKENS]
            self._digest.update(chunk.data)
            if chunk.dtype.itemsize > 2 or chunk.dtype.kind != "u":  # u16 has few counts: checked afterwards
                for extreme in (int(chunk.min()), int(chunk.max())):
                    if extreme < 0 or (self._vocab_size is not None and extreme >= self._vocab_size):
                        raise self._outside(extreme)
            found = np.bincount(chunk, minlength=len(self.counts))
            if self._vocab_size is not None and len(found) > self._vocab_size:
                raise self._outside(len(found) - 1)
            found[: len(self.counts)] += self.counts
            self.counts = found.astype(np.int64, copy=False)
            self._tell(len(chunk))

    def _outside(self, token: int) -> DataError:
        return DataError(
            f"{self.name}: has token {token} outside the vocabulary of {self._vocab_size}; "
            "the dataset was built with another tokenizer, or is damaged"
        )

    def summary(self) -> TokenSummary:
        total = int(self.counts.sum())
        seen = self.counts[self.counts > 0]
        shares = seen / max(1, total)
        return TokenSummary(
            tokens=total,
            largest_token=int(np.flatnonzero(self.counts)[-1]) if len(seen) else -1,
            distinct_tokens=len(seen),
            unigram_entropy=float(-(shares * np.log(shares)).sum()) if len(seen) else 0.0,
            sha256=self._digest.hexdigest(),
        )


def count_tokens(dataset: IndexedDataset, vocab_size: int | None = None, tell: Tell = no_tell) -> TokenCounter:
    """Count all tokens of a dataset.

    Raises:
        DataError: a token outside [0, vocab_size), which would fail in a model, or a negative one.
    """
    counter = TokenCounter(vocab_size, bin_path(dataset.prefix), tell)
    counter.add(dataset.tokens)
    return counter
