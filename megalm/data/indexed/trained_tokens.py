"""PREFIX.trained: one bit a token, whether it is trained; only beside datasets of conversations.

Bit i of byte i // 8, counted from the lowest, is that of token i of PREFIX.bin. A token that is not trained is read as
context, and is no target of the loss.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megalm.errors import DataError

Bools = npt.NDArray[np.bool_]
COUNTED_BYTES = 1 << 22


def trained_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.trained")


def trained_share(trained: int, tokens: int) -> str:
    """Return a phrase such as "12,345 of 50,000 (24.7%)"."""
    return f"{trained:,} of {tokens:,} ({trained / max(1, tokens):.1%})"


class TrainedTokens:
    """The bits of a dataset's tokens, mapped.

    Args:
        tokens: the number of tokens of the dataset.

    Raises:
        DataError: the file has another size, so it belongs to other tokens, or is cut short.
    """

    def __init__(self, prefix: str | Path, tokens: int) -> None:
        path = trained_path(prefix)
        size, expected = path.stat().st_size, -(-tokens // 8)
        if size != expected:
            raise DataError(
                f"{path}: {expected:,} bytes expected for {tokens:,} tokens, {size:,} found; the file is cut short or "
                "belongs to other tokens, copy or build it again"
            )
        self._bits: npt.NDArray[np.uint8] = (
            np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)
        )
        self._tokens = tokens

    def at(self, positions: npt.NDArray[np.int64] | range) -> Bools:
        """Return [n] whether the tokens at these positions are trained."""
        if isinstance(positions, range):
            first = positions.start // 8
            bits = np.unpackbits(self._bits[first : -(-positions.stop // 8)], bitorder="little")
            return bits[positions.start - 8 * first : positions.stop - 8 * first].astype(np.bool_)
        return (self._bits[positions >> 3] >> (positions & 7).astype(np.uint8) & 1).astype(np.bool_)

    def count(self, first: int = 0, end: int | None = None) -> int:
        """Return how many of the tokens [first, end) are trained."""
        end = self._tokens if end is None else end
        steps = range(first, end, 8 * COUNTED_BYTES)
        return sum(int(self.at(range(start, min(start + steps.step, end))).sum()) for start in steps)

    def sha256(self) -> str:
        return hashlib.sha256(self._bits.data).hexdigest()


class BitPacker:
    """Packs bits that come in rows of any length into bytes, the first into the lowest bit."""

    def __init__(self) -> None:
        self._rest: Bools = np.zeros(0, dtype=np.bool_)

    def add(self, bits: Bools) -> npt.NDArray[np.uint8]:
        """Return the bytes that are complete with these bits."""
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self._rest = bits[whole:]
        return np.packbits(bits[:whole], bitorder="little")

    def end(self) -> npt.NDArray[np.uint8]:
        """Return the last byte, if bits are left."""
        return np.packbits(self._rest, bitorder="little")
