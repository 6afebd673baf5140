"""One rank's file of a checkpoint: safetensors, written as a stream.

The safetensors library wants every tensor in memory and contiguous at once; a rank's fragments are views into much
larger buffers. The format (https://github.com/huggingface/safetensors#format) is a length, a JSON header and the
bytes, so it is written here one tensor at a time, hashed on the way by a second thread: SHA-256 and the disk are of
like speed, one after the other they would take twice as long. Reading uses the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megalm.checkpoint.fragment import Fragment, FragmentKey

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class ShardSummary:
    """What the manifest says of a shard."""

    file: str
    bytes: int
    sha256: str
    keys: tuple[FragmentKey, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a safetensors header announces it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_name(key: FragmentKey) -> str:
    """`master/layers.0.mlp.up.weight`; unique in a file, because a rank owns one range of a parameter."""
    return f"{key.kind}/{key.name}"


def is_whole(key: FragmentKey) -> bool:
    return key.rectangle is None and key.stop - key.start == math.prod(key.shape)


def write_shard(path: Path, fragments: Sequence[Fragment]) -> ShardSummary:
    """Write fp32 fragments to `path` and make them durable.

    A fragment that is a whole parameter is stored in its shape, so that a one-rank checkpoint reads as the model;
    a part is stored flat, and the manifest says which part it is.

    Raises:
        OSError: the disk is full or fails; nothing under the final name of the checkpoint exists then.
    """
    keys = tuple(fragment.key for fragment in fragments)
    entries = [TensorEntry(tensor_name(key), key.shape if is_whole(key) else (key.stop - key.start,)) for key in keys]
    with path.open("wb") as file:
        written, sha256 = write_tensors(file, entries, (fragment.tensor for fragment in fragments))
        file.flush()
        os.fsync(file.fileno())
    return ShardSummary(path.name, written, sha256, keys)


def write_tensors(file: BinaryIO, entries: Sequence[TensorEntry], tensors: Iterable[Tensor]) -> tuple[int, str]:
    """Write a safetensors file of `tensors`, which come in the order of `entries`, one in memory at a time.

    Returns:
        bytes written, and their SHA-256.
    """
    digest = hashlib.sha256()
    written = 0
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(1, "hash") as hasher:

        def write(part: Any) -> None:
            nonlocal written, hashed
            before, hashed = hashed, hasher.submit(digest.update, part)
            written += file.write(part)
            if before is not None:
                before.result()  # so that no more than two parts are in memory

        header = _header(entries)
        write(len(header).to_bytes(8, "little"))
        write(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tensor.numel() == math.prod(entry.shape), entry
            write(_bytes(tensor, entry.dtype))
        if hashed is not None:
            hashed.result()
    return written, digest.hexdigest()


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


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    return tensor.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
