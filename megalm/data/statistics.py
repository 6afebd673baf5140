"""Facts about a dataset that take reading all of it: lengths, frequent tokens, fallback, duplicates."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalm.data.dedup import SeenExactly, exact_signatures
from megalm.data.indexed import IndexedDataset
from megalm.data.summary import Tell, TokenCounter, no_tell
from megalm.data.tokenizer import Tokenizer

HASHED_DOCUMENTS = 4096


@dataclass(frozen=True)
class Statistics:
    """Attributes:
    length_histogram: (from, to, documents): lengths in tokens, in powers of two.
    frequent: (id, share of all tokens), the most frequent first.
    tokens_per_byte, fallback_share: None without a tokenizer.
    duplicates: documents whose tokens came before.
    """

    length_histogram: list[tuple[int, int, int]]
    frequent: list[tuple[int, float]]
    tokens_per_byte: float | None
    fallback_share: float | None
    duplicates: int


def statistics(
    dataset: IndexedDataset, tokenizer: Tokenizer | None = None, most: int = 20, tell: Tell = no_tell
) -> Statistics:
    """Read everything, twice.

    Raises:
        DataError: a token that the tokenizer does not have.
    """
    counter = TokenCounter(tokenizer.vocab_size if tokenizer else None, dataset.prefix, tell)
    counter.add(dataset.tokens)
    counts, total = counter.counts, max(1, len(dataset.tokens))
    order = np.argsort(-counts, kind="stable")[:most]
    text_bytes = fallback = None
    if tokenizer is not None:
        text_bytes = int((tokenizer.token_bytes().astype(np.int64) * counts).sum())
        fallback = float(counts[tokenizer.fallback_ids()].sum() / total)
    return Statistics(
        length_histogram=_histogram(dataset),
        frequent=[(int(token), float(counts[token] / total)) for token in order if counts[token]],
        tokens_per_byte=len(dataset.tokens) / text_bytes if text_bytes else None,
        fallback_share=fallback,
        duplicates=_duplicates(dataset, tell),
    )


def _histogram(dataset: IndexedDataset) -> list[tuple[int, int, int]]:
    lengths = np.asarray(dataset.sequence_lengths)
    powers = np.bincount(np.frexp(lengths.astype(np.float64))[1].clip(0))
    return [(2**power >> 1, 2**power - 1, int(count)) for power, count in enumerate(powers) if count]


def _duplicates(dataset: IndexedDataset, tell: Tell) -> int:
    repeated = 0
    with tempfile.TemporaryDirectory() as folder:
        seen = SeenExactly(Path(folder) / "seen")
        for start in range(0, len(dataset), HASHED_DOCUMENTS):
            rows = [
                dataset[index].astype(np.int32) for index in range(start, min(start + HASHED_DOCUMENTS, len(dataset)))
            ]
            repeated += int((~seen.add(exact_signatures(rows))).sum())
            tell(sum(map(len, rows)))
    return repeated
