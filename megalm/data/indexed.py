"""Token files in the MMapIndexedDataset format: PREFIX.bin (raw tokens) and PREFIX.idx (where each sequence lies).

The format is the one that Megatron-LM, Megatron-DeepSpeed and gpt-neox read and write. All integers are
little-endian:

    0   9 bytes  magic          18  u64     S, number of sequences      34  i32[S]  lengths in tokens
    9   u64      version 1      26  u64     D, documents + 1                i64[S]  byte offsets in .bin
    17  u8       dtype code                                                i64[D]  first sequence of each document
                                                                           i8[S]   modes (optional, ignored)

S sequences, D documents + 1, N tokens.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megalm.data.files import writing_to
from megalm.durable import sync_directory, temporary_name
from megalm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[np.generic]] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
# Below this size of vocabulary a token fits u16 with room for a few more, as the peers have it.
UINT16_VOCABULARY = 65_500
PROBES, PROBE_TOKENS = 64, 4096
SPOOLED_BYTES = 1 << 22


def best_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The smallest dtype that the peers use for such a vocabulary: u16, or i32 from 65,500 on."""
    return DTYPES[8] if vocab_size < UINT16_VOCABULARY else DTYPES[4]


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    """PREFIX.json: what the dataset was made of; readers do without it."""
    return Path(f"{prefix}.json")


class IndexedDataset:
    """A memory-mapped dataset; opening it reads the index's header and checks the sizes of both files.

    Attributes:
        sequence_lengths: i32[S] in tokens; sequence_pointers: i64[S] in bytes; document_index: i64[D]. Views of
            the file, not aligned in memory.
        tokens: [N], all tokens, in the file's order.

    Raises:
        DataError: files that are absent, of another format or version, cut short or too long.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
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
        self._check_ends()
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

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.generic]:
        """Tokens of sequence `index`, a read-only view of the file."""
        start = int(self.sequence_pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]

    def expect_random_reads(self) -> None:
        """Tell the system that tokens are read here and there: else it reads megabytes around every sample."""
        mapped = getattr(self._raw, "_mmap", None)  # none of an empty file
        if mapped is not None and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)

    @property
    def document_count(self) -> int:
        return len(self.document_index) - 1

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content: all lengths, and 64 probes spread evenly over the tokens; not the file's name."""
        digest = hashlib.sha256(f"{self.dtype.str} {len(self)} {len(self.tokens)}".encode())
        digest.update(np.ascontiguousarray(self.sequence_lengths).data)
        for start in np.linspace(0, max(0, len(self.tokens) - PROBE_TOKENS), PROBES, dtype=np.int64):
            digest.update(np.ascontiguousarray(self.tokens[start : start + PROBE_TOKENS]).data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Check every entry of the index, which opening does not: lengths, offsets and documents fit together.

        Raises:
            DataError: naming the first entry that is wrong.
        """
        ends = np.cumsum(self.sequence_lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
        for wrong, what in (
            (self.sequence_lengths < 0, "a negative length in sequence"),
            (self.sequence_pointers != starts, "offset and lengths disagree at sequence"),
            (np.diff(self.document_index) < 0, "the documents go backwards at document"),
        ):
            if wrong.any():
                raise DataError(
                    f"{idx_path(self.prefix)}: {what} {int(wrong.argmax())}; the index is damaged, build it again"
                )

    def _check_ends(self) -> None:
        documents = self.document_index
        if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(self):
            raise DataError(
                f"{idx_path(self.prefix)}: the documents do not run from sequence 0 to {len(self)}; "
                "the index is damaged, build it again"
            )


class IndexedDatasetWriter:
    """Writes a dataset under temporary names; `close()` gives it its own, the index last.

    As a context manager it closes at the end and aborts on an exception; after `abort()` nothing is left and
    what stood under the name before still stands.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[np.generic] | type[np.generic]) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = _dtype_code(self.dtype)
        self._count = 0  # sequences
        self._bin_temporary = temporary_name(bin_path(prefix))
        self._idx_temporary = temporary_name(idx_path(prefix))
        with writing_to(bin_path(prefix)):
            self._bin_temporary.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._bin_temporary.open("wb")
            # Of a billion documents the index is 20 GB: it is kept in nameless files until the end.
            self._lengths, self._documents = _spool(self._bin_temporary.parent), _spool(self._bin_temporary.parent)

    def append(self, tokens: npt.ArrayLike) -> None:
        """Add a document of one sequence, [n] tokens."""
        row = np.asarray(tokens)
        self.append_documents(row, [len(row)])

    def append_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Add documents of one sequence each: their tokens one after another [sum n], and their lengths [documents].

        Raises:
            DataError: a token that the dtype cannot hold (it would become another one), or a full disk.
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        self.append_sequences(tokens, sizes, np.arange(1, 1 + len(sizes)))

    def append_sequences(
        self, tokens: npt.ArrayLike, lengths: npt.NDArray[Any], document_ends: npt.NDArray[np.int64]
    ) -> None:
        """The same for documents of several sequences: tokens [sum n], lengths [sequences], and how many sequences
        come before the end of each document [documents]."""
        flat, sizes = np.asarray(tokens), lengths
        assert sizes.sum() == len(flat), "lengths and tokens disagree"
        if flat.dtype != self.dtype and len(flat):
            self._check_range(flat)
        with writing_to(bin_path(self.prefix)):
            self._file.write(np.ascontiguousarray(flat, dtype=self.dtype).data)
            self._add_to_index(sizes, document_ends)

    def append_dataset(
        self,
        dataset: IndexedDataset,
        chunk_tokens: int = 1 << 22,
        watch: Callable[[npt.NDArray[np.generic]], None] | None = None,
    ) -> None:
        """Add all sequences and documents of another dataset of the same dtype, as they are.

        Args:
            watch: called with every piece of tokens that is copied.

        Raises:
            DataError: another dtype.
        """
        self.check_dtype(dataset)
        with writing_to(bin_path(self.prefix)):
            for start in range(0, len(dataset.tokens), chunk_tokens):
                piece = dataset.tokens[start : start + chunk_tokens]
                if watch is not None:
                    watch(piece)
                self._file.write(piece.data)
            self._add_to_index(dataset.sequence_lengths, dataset.document_index[1:])

    def check_dtype(self, dataset: IndexedDataset) -> None:
        """Raise DataError where its tokens are of another dtype."""
        if dataset.dtype != self.dtype:
            raise DataError(
                f"{dataset.prefix}: holds {dataset.dtype}, the output {self.dtype}; "
                "only datasets of one tokenizer can be merged, build it again with the other's"
            )

    def close(self) -> None:
        """Write the index and give both files their names, atomically one after the other."""
        with writing_to(idx_path(self.prefix)):
            try:
                _sync_and_close(self._file)
                with self._idx_temporary.open("wb") as index:
                    self._write_index(index)
                    index.flush()
                    os.fsync(index.fileno())
                # Without its index an old dataset is absent; a new .bin beside an old .idx could pass for one.
                idx_path(self.prefix).unlink(missing_ok=True)
                self._bin_temporary.replace(bin_path(self.prefix))
                self._idx_temporary.replace(idx_path(self.prefix))
            except BaseException:
                self.abort()
                raise
            sync_directory(bin_path(self.prefix).parent)

    def abort(self) -> None:
        """Throw away what was written."""
        self._file.close()
        self._lengths.close()
        self._documents.close()
        self._bin_temporary.unlink(missing_ok=True)
        self._idx_temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _check_range(self, tokens: npt.NDArray[np.generic]) -> None:
        limits = np.iinfo(self.dtype.name)
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < limits.min or high > limits.max:
            wrong = low if low < limits.min else high
            raise DataError(
                f"{bin_path(self.prefix)}: token {wrong} does not fit {self.dtype}; "
                "choose the dtype with best_dtype(vocab_size)"
            )

    def _add_to_index(self, lengths: npt.NDArray[Any], document_ends: npt.NDArray[Any]) -> None:
        """Sequence lengths, and where documents end among them."""
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._documents.write((document_ends + self._count).astype("<i8").tobytes())
        self._count += len(lengths)

    def _write_index(self, index: BinaryIO) -> None:
        documents = self._documents.tell() // 8
        index.write(HEADER.pack(MAGIC, VERSION, self._code, self._count, documents + 1))
        for lengths in _pieces(self._lengths, "<i4"):
            index.write(lengths.data)
        end = 0
        for lengths in _pieces(self._lengths, "<i4"):
            ends = end + np.cumsum(lengths, dtype=np.int64)
            index.write(((ends - lengths) * self.dtype.itemsize).astype("<i8").data)
            end = int(ends[-1])
        index.write(bytes(8))
        for ends in _pieces(self._documents, "<i8"):
            index.write(ends.data)


def _spool(folder: Path) -> tempfile.SpooledTemporaryFile[bytes]:
    return tempfile.SpooledTemporaryFile(SPOOLED_BYTES, dir=str(folder))


def _pieces(file: tempfile.SpooledTemporaryFile[bytes], dtype: str) -> Iterator[npt.NDArray[Any]]:
    file.seek(0)
    while piece := file.read(SPOOLED_BYTES):
        yield np.frombuffer(piece, dtype=dtype)


def _dtype_code(dtype: np.dtype[np.generic]) -> int:
    for code, known in DTYPES.items():
        if known == dtype and known.kind in "iu":
            return code
    raise DataError(f"{dtype} is not an integer type of the indexed format; use best_dtype(vocab_size)")


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


def _map_bytes(path: Path) -> npt.NDArray[np.uint8]:
    try:
        size = path.stat().st_size
        if size == 0:  # cannot be mapped
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror}); check the dataset prefix") from error


def _view(raw: npt.NDArray[np.uint8], dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
    return np.frombuffer(raw, dtype=dtype, count=count, offset=offset) if count else np.zeros(0, dtype=dtype)


def _read_header(raw: npt.NDArray[np.uint8], path: Path) -> tuple[int, int, np.dtype[np.generic]]:
    start = raw[: HEADER.size].tobytes()
    if start.startswith(LEGACY_MAGIC):
        raise DataError(f"{path}: the legacy TNTIDX format; convert it with the tool that wrote it, or build it again")
    if not start.startswith(MAGIC[: len(start)]):
        raise DataError(f"{path}: not an index of tokens (it starts with {start[:9]!r}); check the dataset prefix")
    if len(start) < HEADER.size:
        raise DataError(
            f"{path}: {HEADER.size} bytes expected for its header, {len(start)} found; "
            "the file is cut short, copy or build it again"
        )
    _, version, code, count, documents = HEADER.unpack(start)
    if version != VERSION:
        raise DataError(f"{path}: version {version}, this reads version {VERSION}; build it again")
    if code not in DTYPES:
        raise DataError(f"{path}: unknown dtype code {code}, known are {sorted(DTYPES)}; build it again")
    return count, documents, DTYPES[code]
