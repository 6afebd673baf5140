"""Write datasets in the format of dataset.py, complete or absent, and the per-document rows beside them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megalm.data.indexed.dataset import DTYPES, HEADER, MAGIC, VERSION, bin_path, idx_path
from megalm.errors import DataError
from megalm.utils.atomic_files import discard, sync_directory, temporary_name, writing_to

SPOOLED_BYTES = 1 << 22


class IndexedDatasetWriter:
    """Writes a dataset under temporary names; `close()` renames the files, the index last.

    As a context manager it closes at the end and aborts on an exception. `abort()` removes everything written and
    leaves an existing dataset of that name unchanged.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[np.generic] | type[np.generic]) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(f"{self.dtype} is not an integer type of the indexed format; use best_dtype(vocab_size)")
        self._code = codes[0]
        self._count = 0  # sequences
        self._bin_temporary = temporary_name(bin_path(prefix))
        self._idx_temporary = temporary_name(idx_path(prefix))
        with writing_to(bin_path(prefix)):
            self._bin_temporary.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._bin_temporary.open("wb")
            # The index of a billion documents is 20 GB, so it is kept in unnamed files until the end.
            self._lengths, self._documents = _spool(self._bin_temporary.parent), _spool(self._bin_temporary.parent)

    def append(self, tokens: npt.ArrayLike) -> None:
        """Append a document of one sequence, [n] tokens."""
        row = np.asarray(tokens)
        self.append_documents(row, [len(row)])

    def append_documents(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike, document_ends: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Append documents.

        Args:
            tokens: [sum n] of all their sequences, concatenated.
            lengths: [sequences] in tokens.
            document_ends: [documents] cumulative sequence count at the end of each document; None: one sequence each.

        Raises:
            DataError: a token does not fit the dtype, or the disk is full.
        """
        flat, sizes = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        ends = np.arange(1, 1 + len(sizes)) if document_ends is None else document_ends
        assert sizes.sum() == len(flat), "lengths and tokens disagree"
        if flat.dtype != self.dtype and len(flat):
            self._check_range(flat)
        with writing_to(bin_path(self.prefix)):
            self._file.write(np.ascontiguousarray(flat, dtype=self.dtype).data)
            self._lengths.write(sizes.astype("<i4").tobytes())
            self._documents.write((ends + self._count).astype("<i8").tobytes())
        self._count += len(sizes)

    def close(self) -> None:
        """Write the index and give both files their final names, each atomically."""
        with writing_to(idx_path(self.prefix)):
            try:
                with self._file, self._idx_temporary.open("wb") as index:
                    self._write_index(index)
                    for file in (self._file, index):
                        file.flush()
                        os.fsync(file.fileno())
                # An old dataset without its index counts as absent; a new .bin beside an old .idx could look valid.
                idx_path(self.prefix).unlink(missing_ok=True)
                self._bin_temporary.replace(bin_path(self.prefix))
                self._idx_temporary.replace(idx_path(self.prefix))
            except BaseException:
                self.abort()
                raise
            sync_directory(bin_path(self.prefix).parent)

    def abort(self) -> None:
        """Discard everything written."""
        discard(self._file, self._bin_temporary)
        for spool in (self._lengths, self._documents):
            discard(spool)
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


class RowWriter:
    """Writes per-document rows beside the tokens, to a file that gets its final name in `close()`."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary, self._hash = path, temporary_name(path), hashlib.sha256()
        with writing_to(path):
            self._file = self._temporary.open("wb")

    def add(self, rows: npt.NDArray[Any]) -> None:
        content = np.ascontiguousarray(rows).tobytes()
        self._hash.update(content)
        with writing_to(self._path):
            self._file.write(content)

    def close(self) -> str:
        """Rename the file to its final name; return its hash."""
        with writing_to(self._path):
            self._file.close()
            self._temporary.replace(self._path)
        return self._hash.hexdigest()

    def abort(self) -> None:
        discard(self._file, self._temporary)


def _spool(folder: Path) -> tempfile.SpooledTemporaryFile[bytes]:
    return tempfile.SpooledTemporaryFile(SPOOLED_BYTES, dir=str(folder))


def _pieces(file: tempfile.SpooledTemporaryFile[bytes], dtype: str) -> Iterator[npt.NDArray[Any]]:
    file.seek(0)
    while piece := file.read(SPOOLED_BYTES):
        yield np.frombuffer(piece, dtype=dtype)
