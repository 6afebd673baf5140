"""What came before: exactly, whatever collides, and nearly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalm.data.builder.dedup import ExactDeduplicator, MinHashDeduplicator, exact_signatures, minhash_signatures


@pytest.mark.parametrize("spread", [1, 1 << 20])
def test_the_first_of_equal_ones_is_new(tmp_path: Path, spread: int) -> None:
    """Keys that all start at the same place of the table, in batches, while it grows."""
    random = np.random.default_rng(3)
    seen, known = ExactDeduplicator(tmp_path / "seen"), set()
    for _ in range(40):
        keys = np.zeros((500, 2), dtype=np.uint64)
        keys[:, 0] = random.integers(0, 6000, 500).astype(np.uint64) * np.uint64(spread)
        keys[:, 1] = random.integers(0, 2, 500)
        expected = []
        for key in map(tuple, keys.tolist()):
            # (0, 0) marks an empty place, and (1, 1) stands for it.
            key = (1, 1) if key == (0, 0) else key  # noqa: PLW2901
            expected.append(key not in known)
            known.add(key)
        assert seen.add(keys).tolist() == expected
    assert len(known) > 6000


def test_signatures_are_of_the_tokens() -> None:
    rows = [np.array(row, dtype=np.int32) for row in ([1, 2], [1, 2], [1], [1, 2, 0], [])]
    signatures = exact_signatures(rows)
    assert signatures.shape == (5, 2)
    assert (signatures[0] == signatures[1]).all()
    assert len(np.unique(signatures, axis=0)) == 4


def test_near_copies(tmp_path: Path, source_texts: list[str]) -> None:
    paragraphs = [text for source in source_texts for text in source.split("\n\n") if len(text.split()) > 60][:60]
    near = [" ".join([*text.split()[:-1], "other"]) for text in paragraphs]
    different = [text[::-1] for text in paragraphs]
    seen = MinHashDeduplicator(tmp_path / "seen", 0.7)
    assert seen.add(minhash_signatures(paragraphs)).sum() >= 55
    assert seen.add(minhash_signatures(near)).sum() <= 5
    assert seen.add(minhash_signatures(different)).all()


def test_short_texts_are_near_only_if_equal(tmp_path: Path) -> None:
    signatures = minhash_signatures(["a b", "a c", "a b", "", ""])
    assert MinHashDeduplicator(tmp_path / "seen", 0.8).add(signatures).tolist() == [True, True, False, True, False]
