"""The size of a model and of its batch, as the benchmarks have it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Attributes: batch: sequences of a step."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence
