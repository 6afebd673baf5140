"""Write a rank's shard of a checkpoint as safetensors, in a stream.

The safetensors library needs all tensors contiguous in memory at once, but a rank's fragments are views into much
larger buffers. The format (https://github.com/huggingface/safetensors#format) is a length, a JSON header and the
bytes, so this module writes one tensor at a time. A second thread hashes: SHA-256 and the disk are about equally fast,
and one after the other would take twice as long. Reading uses the library.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megalm.checkpoint.shard_spec import Fragment, FragmentKey

Buffer = bytes | memoryview

_HASH_BATCH_BYTES = 16 << 20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class ShardSummary:
    """A shard's data for the manifest."""

    file: str
    bytes: int
    sha256: str
    keys: tuple[FragmentKey, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in a safetensors header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(path: Path, fragments: Sequence[Fragment]) -> ShardSummary:
    """Write fp32 fragments to `path` and make them durable.

    A fragment that is a full parameter is stored in its shape, so that a one-rank checkpoint loads as the model;
    a partial one is stored flat, and the manifest gives its range.

    Raises:
        OSError: the disk is full or fails; nothing has the checkpoint's final name then.
    """
    keys = tuple(fragment.key for fragment in fragments)
    whole = [key.rectangle is None and key.count == math.prod(key.shape) for key in keys]
    shapes = [key.shape if is_whole else (key.count,) for key, is_whole in zip(keys, whole, strict=True)]
    entries = [TensorEntry(key.tensor_name, shape) for key, shape in zip(keys, shapes, strict=True)]
    with path.open("wb") as file:
        written, sha256 = write_tensors(file, entries, (fragment.tensor for fragment in fragments))
        file.flush()
        os.fsync(file.fileno())
    return ShardSummary(path.name, written, sha256, keys)


def write_tensors(file: BinaryIO, entries: Sequence[TensorEntry], tensors: Iterable[Tensor]) -> tuple[int, str]:
    """Write `tensors`, in the order of `entries`, as a safetensors file; one is in memory at a time.

    Returns:
        Bytes written, and their SHA-256.
    """
    header = _header(entries)
    written = 0
    with HashThread() as digest:
        for part in itertools.chain([len(header).to_bytes(8, "little"), header], _parts(entries, tensors)):
            digest.update(part)
            written += file.write(part)
    return written, digest.hexdigest


class HashThread:
    """Computes a SHA-256 in a separate thread; at most two batches wait in memory."""

    def __init__(self) -> None:
        self.hexdigest = ""  # set on exit
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "hash")
        self._waiting: Future[None] | None = None
        self._batch: list[Buffer] = []
        self._bytes = 0

    def update(self, part: Buffer) -> None:
        """Batch small parts: passing one to the thread costs more than hashing a bias."""
        self._batch.append(part)
        self._bytes += len(part)
        if self._bytes >= _HASH_BATCH_BYTES:
            self._hand_over()

    def _hand_over(self) -> None:
        before, self._waiting = self._waiting, self._pool.submit(self._hash, self._batch)
        self._batch, self._bytes = [], 0
        if before is not None:
            before.result()

    def _hash(self, batch: list[Buffer]) -> None:
        for part in batch:
            self._sha256.update(part)

    def __enter__(self) -> HashThread:
        return self

    def __exit__(self, *error: object) -> None:
        self._hand_over()
        self._pool.shutdown()
        self.hexdigest = self._sha256.hexdigest()


def _parts(entries: Sequence[TensorEntry], tensors: Iterable[Tensor]) -> Iterator[Buffer]:
    for entry, tensor in zip(entries, tensors, strict=True):
        assert tensor.numel() == math.prod(entry.shape), entry
        yield tensor.detach().cpu().to(entry.dtype).contiguous().view(-1).view(torch.uint8).numpy().data


def _header(entries: Sequence[TensorEntry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        assert entry.name not in header, entry
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % 8)
