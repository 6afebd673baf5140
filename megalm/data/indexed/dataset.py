"""Read token files in the MMapIndexedDataset format: PREFIX.bin (raw tokens) and PREFIX.idx (where sequences lie).

Megatron-LM, Megatron-DeepSpeed and gpt-neox read and write the same format. All integers are little-endian:

    0   9 bytes  magic          18  u64     S, number of sequences      34  i32[S]  lengths in tokens
    9   u64      version 1      26  u64     D, documents + 1                i64[S]  byte offsets in .bin
    17  u8       dtype code                                                i64[D]  first sequence of each document
                                                                           i8[S]   modes (optional, ignored)

S sequences, D documents + 1, N tokens.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.trained_tokens import TrainedTokens, trained_path
from megalm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[np.generic]] = {
    code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
FLOAT_CODES = {6: "float64", 7: "float32"}  # the format has them, but they cannot be token ids
# Below this vocabulary size a token fits u16 with a few ids to spare, as in Megatron-LM.
UINT16_VOCABULARY = 65_500
PROBES, PROBE_TOKENS = 64, 4096
CHECKED_ENTRIES = 1 << 22  # per batch: the index of a billion documents is 20 GB


def best_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """Return the token dtype that Megatron-LM uses for this vocabulary size: u16, or i32 from 65,500 on."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY else DTYPES[4]


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    """Return PREFIX.json: how the dataset was built; optional for readers."""
    return Path(f"{prefix}.json")


class IndexedDataset:
    """A memory-mapped dataset; opening it checks the sizes of both files and every index entry.

    Args:
        vocab_size: `read` refuses tokens from this id on; None accepts all nonnegative tokens.
        check: called to check every index entry (20 bytes per sequence are read); default `verify`.

    Attributes:
        sequence_lengths: i32[S] in tokens; sequence_pointers: i64[S] in bytes; document_index: i64[D]. Views of
            the file, not aligned in memory.
        tokens: [N], all tokens in file order.
        trained: which of them are trained; None if all are.

    Raises:
        DataError: a file is missing, has another format or version, is too short or too long, or the index is damaged.
    """

    def __init__(
        self, prefix: str | Path, vocab_size: int | None = None, check: Callable[[IndexedDataset], None] | None = None
    ) -> None:
        self.prefix, self.vocab_size = str(prefix), vocab_size
        index = _map_bytes(idx_path(prefix))
        count, documents, self.dtype = _read_header(index, idx_path(prefix))
        base = HEADER.size
        expected = base + 12 * count + 8 * documents
        if len(index) not in (expected, expected + count):
            raise DataError(
                f"{idx_path(prefix)}: {expected:,} bytes expected for {count:,} sequences, {len(index):,} found; "
                "the file is cut short or damaged, copy or build it again"
            )
        self.sequence_lengths: npt.NDArray[np.int32] = _view(index, "<i4", count, base)
        self.sequence_pointers: npt.NDArray[np.int64] = _view(index, "<i8", count, base + 4 * count)
        self.document_index: npt.NDArray[np.int64] = _view(index, "<i8", documents, base + 12 * count)
        if documents == 0 or self.document_index[0] != 0 or self.document_index[-1] != count:
            raise DataError(
                f"{idx_path(prefix)}: the documents do not cover sequences 0 to {count}; the index is damaged; "
                "rebuild it"
            )
        (check or IndexedDataset.verify)(self)
        raw = _map_bytes(bin_path(prefix))
        size = 0
        if count:
            size = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if len(raw) != size:
            raise DataError(
                f"{bin_path(prefix)}: {size:,} bytes expected by {idx_path(prefix).name}, {len(raw):,} found; "
                "the file is cut short or belongs to another index, copy or build it again"
            )
        self._raw = raw
        self.tokens: npt.NDArray[np.generic] = raw.view(self.dtype)
        self.trained = TrainedTokens(prefix, len(self.tokens)) if trained_path(prefix).exists() else None

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.generic]:
        """Return the tokens of sequence `index`, a read-only view of the file."""
        positions = self.sequence_positions(index)
        return self.tokens[positions.start : positions.stop]

    def sequence_positions(self, index: int) -> range:
        """Return the positions in `tokens` of sequence `index`."""
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize
        return range(start, start + int(self.sequence_lengths[index]))

    def begins_sequence(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return [n] whether the tokens at these positions of `tokens` are the first of their sequence."""
        offsets = positions * self.dtype.itemsize
        last = np.searchsorted(self.sequence_pointers, offsets, side="right") - 1
        return np.asarray(self.sequence_pointers[last] == offsets)

    def read(self, positions: npt.NDArray[np.int64] | range) -> npt.NDArray[np.int64]:
        """Return the tokens at these positions of `tokens`.

        Raises:
            DataError: a token is outside the vocabulary, which a model computes with in silence, or crashes at.
        """
        chosen = slice(positions.start, positions.stop) if isinstance(positions, range) else positions
        tokens = self.tokens[chosen].astype(np.int64)
        if len(tokens) and (tokens.min() < 0 or (self.vocab_size is not None and tokens.max() >= self.vocab_size)):
            wrong = (tokens < 0) | (tokens >= (tokens.max() + 1 if self.vocab_size is None else self.vocab_size))
            position = int(np.asarray(positions)[wrong][0])
            size = "" if self.vocab_size is None else f" of {self.vocab_size:,} ids"
            raise DataError(
                f"{bin_path(self.prefix)}: document {self.document_at(position)} has token "
                f"{int(self.tokens[position])} (at position {position} of the file) outside the vocabulary{size}; the "
                "dataset was built with another tokenizer, or is damaged"
            )
        return tokens

    def document_at(self, position: int) -> int:
        """Return the number of the document that holds the token at this position of `tokens`."""
        sequence = np.searchsorted(self.sequence_pointers, position * self.dtype.itemsize, side="right") - 1
        return int(np.searchsorted(self.document_index, sequence, side="right")) - 1

    def expect_random_reads(self) -> None:
        """Advise the kernel of random access; otherwise it reads ahead megabytes around every sample."""
        mapped = getattr(self._raw, "_mmap", None)  # an empty file has none
        if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)

    @property
    def document_count(self) -> int:
        return len(self.document_index) - 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: all lengths, and 64 evenly spaced probes of the tokens; independent of the file name.

        Also of which tokens are trained, all of them, if not every one is.
        """
        digest = hashlib.sha256(f"{self.dtype.str} {len(self)} {len(self.tokens)}".encode())
        digest.update(np.ascontiguousarray(self.sequence_lengths).data)
        for start in np.linspace(0, max(0, len(self.tokens) - PROBE_TOKENS), PROBES, dtype=np.int64):
            digest.update(np.ascontiguousarray(self.tokens[start : start + PROBE_TOKENS]).data)
        if self.trained is not None:
            digest.update(self.trained.sha256().encode())
        return digest.hexdigest()

    def verify(self) -> None:
        """Check every index entry: lengths, offsets and documents must be consistent.

        Raises:
            DataError: names the first wrong entry.
        """
        end = 0
        for first in range(0, len(self), CHECKED_ENTRIES):
            lengths = self.sequence_lengths[first : first + CHECKED_ENTRIES]
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            starts = np.append(end, ends[:-1])
            pointers = self.sequence_pointers[first : first + CHECKED_ENTRIES]
            self._refuse(lengths < 0, first, "a negative length in sequence")
            self._refuse(pointers != starts, first, "offset and lengths disagree at sequence")
            end = int(ends[-1])
        for first in range(0, self.document_count, CHECKED_ENTRIES):
            documents = self.document_index[first : first + CHECKED_ENTRIES + 1]
            self._refuse(np.diff(documents) < 0, first, "the documents go backwards at document")

    def _refuse(self, wrong: npt.NDArray[np.bool_], first: int, problem: str) -> None:
        if wrong.any():
            raise DataError(
                f"{idx_path(self.prefix)}: {problem} {first + int(wrong.argmax())}; the index is damaged; rebuild it"
            )


def _map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    try:
        size = path.stat().st_size
        if size == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened ({error.strerror}); give the prefix of a dataset, without .bin"
        ) from error


def _view(raw: npt.NDArray[np.uint8], dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
    return np.frombuffer(raw, dtype=dtype, count=count, offset=offset) if count else np.zeros(0, dtype=dtype)


def _read_header(raw: npt.NDArray[np.uint8], path: Path) -> tuple[int, int, np.dtype[np.generic]]:
    start = raw[: HEADER.size].tobytes()
    if start.startswith(LEGACY_MAGIC):
        raise DataError(
            f"{path}: has the legacy TNTIDX format; convert it with the tool that wrote it, or build it again"
        )
    if not start.startswith(MAGIC[: len(start)]):
        raise DataError(f"{path}: is not a token index (it starts with {start[:9]!r}); check the dataset prefix")
    if len(start) < HEADER.size:
        raise DataError(
            f"{path}: {HEADER.size} bytes expected for its header, {len(start)} found; "
            "the file is cut short, copy or build it again"
        )
    _, version, code, count, documents = HEADER.unpack(start)
    if version != VERSION:
        raise DataError(f"{path}: version {version} is unknown, only version {VERSION} is supported; build it again")
    if code in FLOAT_CODES:
        raise DataError(f"{path}: holds {FLOAT_CODES[code]} values, which are no token ids; build it with integer ids")
    if code not in DTYPES:
        raise DataError(f"{path}: unknown dtype code {code}, the known codes are {sorted(DTYPES)}; build it again")
    return count, documents, DTYPES[code]
