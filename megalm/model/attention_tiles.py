"""How attention on a CPU cuts a sequence into blocks of queries, as integers: no torch, so that a plan can count it."""

from __future__ import annotations

_MOST_BLOCKS = 8  # compiling unrolls them; each more saves ever less of the square above the diagonal
_LEAST_QUERIES = 128  # below, matrix products are too small to be fast
_LONGEST_KEPT = 1024


def query_blocks(length: int) -> list[tuple[int, int]]:
    """[start, end) of each block of queries; it meets the keys [0, end)."""
    size = max(_LEAST_QUERIES, -(-length // _MOST_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def keeps_probabilities(length: int) -> bool:
    """Whether probabilities stay for the backward pass; longer sequences compute them again, for memory's sake."""
    return length <= _LONGEST_KEPT


def kept_probabilities(length: int) -> int:
    """Probabilities that one head keeps of one sequence."""
    return sum((end - start) * end for start, end in query_blocks(length)) if keeps_probabilities(length) else 0
