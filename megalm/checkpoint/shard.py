"""One rank's file of a checkpoint: safetensors, written as a stream.

The safetensors library wants every tensor in memory and contiguous at once; a rank's fragments are views into much
larger buffers. The format (https://github.com/huggingface/safetensors#format) is a length, a JSON header and the
bytes, so it is written here one fragment at a time, hashed on the way. Reading uses the library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.checkpoint.fragment import Fragment, FragmentKey


@dataclass(frozen=True)
class ShardSummary:
    """What the manifest says of a shard."""

    file: str
    bytes: int
    sha256: str
    keys: tuple[FragmentKey, ...]


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
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for fragment in fragments:
        key, size = fragment.key, fragment.tensor.numel() * 4
        shape = list(key.shape) if is_whole(key) else [key.stop - key.start]
        assert tensor_name(key) not in header, key
        header[tensor_name(key)] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:
        for part in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(part)
            written += file.write(part)
        for fragment in fragments:
            data = fragment.tensor.detach().cpu().contiguous().float().view(-1).numpy().data.cast("B")
            digest.update(data)
            written += file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return ShardSummary(path.name, written, digest.hexdigest(), tuple(fragment.key for fragment in fragments))
